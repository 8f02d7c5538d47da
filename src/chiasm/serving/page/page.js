// The page of `chiasm serve`: pictures in, answers beside them. Plain modules that browsers take as they are; every
// request goes to the server that the page came from. Here: how pictures come in, which model is asked, the key.

import { camera } from "./camera.js";
import { Card, cards, turn } from "./card.js";
import { at, counted, make, say, word } from "./dom.js";
import { ask, keepKey, server } from "./server.js";

const SKILLS = {
  classify: "names what is in a picture",
  detect: "finds objects and frames them",
  instances: "finds objects and outlines them",
  segment: "colours a picture by what each part is",
};
const chooser = at("chooser").querySelector("select");

/** Learn what the server has, and let the pictures go that waited for it. */
async function meet() {
  at("trouble").hidden = true;
  try {
    Object.assign(server, await ask("v1/models"));
  } catch (error) {
    at("trouble").firstElementChild.textContent = error.message;
    at("trouble").hidden = error.status === 401; // the form for the key says it
    say(error.status === 401 ? at("key-why").textContent : error.message);
    if (error.status === 503) setTimeout(meet, 1000 * error.after); // it is starting
    return;
  }
  at("key").hidden = true;
  at("chooser").hidden = server.models.length < 2;
  chooser.replaceChildren(...server.models.map(({ name }) => make("option", {}, name)));
  use(server.models.find((model) => model.default));
  for (const card of cards) if (card.status === 401) card.begin();
  turn();
}

/** Ask this model from now on, and say what it is for. */
function use(model) {
  const { name, task, architecture, labels, branches } = model;
  server.model = model;
  chooser.selectedIndex = server.models.indexOf(model);
  const known = name === architecture ? name : `${name} (${architecture})`;
  const parts = branches.length > 1 ? ` It has ${branches.length} branches: ${branches.map(word).join(" and ")}.` : "";
  at("about").textContent = `${known} ${SKILLS[task]}.${parts}`;
  document.title = `${name} – chiasm`;
  at("classes").hidden = false;
  at("classes").firstElementChild.textContent = `It knows ${counted(labels.length, "class", "classes")}`;
  at("classes").lastElementChild.replaceChildren(...labels.map((label) => make("li", {}, label)));
}

/** Take pictures in: the newest on top, several in their order. */
function add(files, name = null) {
  at("hint").hidden = true;
  const added = [...files].map((file) => new Card(file, name ?? file.name));
  at("results").prepend(...added.map((card) => card.element));
  if (added.length) say(`${counted(added.length, "picture")} added`);
}

function hint(text) {
  at("hint").textContent = text;
  at("hint").hidden = false;
  say(text);
}

chooser.addEventListener("change", () => {
  use(server.models[chooser.selectedIndex]);
  for (const card of cards) card.begin();
});
at("trouble").lastElementChild.addEventListener("click", meet);
at("key").addEventListener("submit", (event) => {
  event.preventDefault();
  try {
    keepKey(at("key-field").value.trim());
  } catch {
    return hint("The browser forbids this page to keep the key: allow it to store data.");
  }
  at("key-field").value = "";
  at("key-why").textContent = "The server does not take that key. Type another one."; // seen if it says no again
  meet();
});

at("zone").addEventListener("click", () => at("files").click());
for (const input of [at("files"), at("snapshot")])
  input.addEventListener("change", () => {
    add(input.files, input === at("snapshot") ? "From the camera" : null);
    input.value = ""; // the same file can be chosen again
  });
camera((file) => add([file], "From the camera"), hint);
at("clear").addEventListener("click", () => {
  for (const card of cards) card.drop();
  at("zone").focus();
  say("All pictures removed");
});

document.addEventListener("paste", (event) => {
  const { files } = event.clipboardData;
  if (!files.length) return;
  event.preventDefault();
  add(files, files.length === 1 ? "Pasted picture" : null);
});
let depth = 0; // of elements that a drag is within
document.addEventListener("dragenter", () => document.body.classList.toggle("over", ++depth > 0));
document.addEventListener("dragleave", () => document.body.classList.toggle("over", --depth > 0));
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  depth = 0;
  document.body.classList.remove("over");
  if (event.dataTransfer.files.length) add(event.dataTransfer.files);
  else hint("No file was in what was dropped. Save the picture first, then drop its file here.");
});

meet();
