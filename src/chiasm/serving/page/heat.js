// What each branch saw: heat maps over the picture, one at a time, as strong as the slider says.

import { button, failure, make, percent, say, slider, word } from "./dom.js";
import { outline } from "./frames.js";
import { saver } from "./saving.js";
import { ask, Refusal } from "./server.js";

const STRENGTH = 85; // in percent, until the slider is moved
const WORDS = {
  conv: "What the convolutions found: local detail.",
  tokens: "What self-attention gathered: the picture as a whole.",
  model: "What in the picture spoke for it.",
  fused: "Both branches together.",
  disagreement: "Where only one of the two looks.",
};

let groups = 0; // of radio buttons, on the whole page

/** Put the question that brings heat maps below the picture. */
export function offer(card) {
  const question = card.model.branches.length > 1 ? "What did each branch see?" : "What did the model see?";
  const see = button(question, () => explain(card, card.subject()), { class: "main" });
  card.heats.replaceChildren(make("div", { class: "row" }, see, card.model.task === "classify" ? null : saver(card)));
}

/** Ask for the heat maps of a label, or for null of what the model said itself, and show them. */
export async function explain(card, label) {
  const { signal } = card.stop;
  const asked = (card.asked = {}); // a later question makes this one void
  const held = card.heats.contains(document.activeElement); // by a button that is about to go
  const wait = (seconds) => {
    const busy = `The server is busy. Trying again in ${seconds} s …`;
    const line = make("p", { class: "waiting" }, seconds ? busy : `Looking at what spoke for ${label ?? "it"} …`);
    if (card.asked === asked) card.heats.replaceChildren(line);
  };
  try {
    if (!card.explained.has(label)) {
      wait(0);
      const query = { model: card.model.name, label };
      const { explanations } = await ask("v1/explain", query, card, signal, wait);
      if (!explanations.length) throw new Refusal("Nothing was found, so nothing is explained.");
      card.explained.set(label, explanations);
    }
    if (signal.aborted || card.asked !== asked) return;
    show(card, card.explained.get(label), 0);
    if (held) card.heats.querySelector("input:checked, input[type=range]").focus();
  } catch (error) {
    if (signal.aborted || card.asked !== asked) return;
    if (!(error instanceof Refusal)) console.error(error);
    hide(card, false);
    card.heats.replaceChildren(failure(error.message, () => explain(card, label), `heat maps of ${card.name}`));
    if (held) card.heats.querySelector("button").focus();
    say(`${card.name}: ${error.message}`);
  }
}

/** Take the heat maps away. */
export function hide(card, focus = true) {
  card.asked = null; // an answer that is still to come is void
  card.bare();
  card.calm();
  card.mark(null);
  offer(card);
  if (focus) card.heats.querySelector("button").focus();
}

function show(card, explanations, which) {
  const { subject, scores, overlap, layers, box, region } = explanations[which];
  const parts = Object.keys(layers).filter((name) => !["fused", "disagreement"].includes(name));
  const names = parts.length > 1 ? Object.keys(layers) : parts; // of one branch, fused is the same again
  const [left, top, right, bottom] = region;
  const cut = left > 1 || top > 1 || right < card.width - 1 || bottom < card.height - 1;
  const heat = card.part(".heat");
  const note = make("p", { class: "muted" });
  const scale = make("div", { class: "ramp muted" });

  const see = (name) => {
    const two = name === "disagreement";
    const [low, high] = two ? parts.map(word) : ["less", "more"];
    card.shown = { name, subject };
    card.kept = name; // for the next label, too
    Object.assign(heat, { src: layers[name], alt: `Heat map ${word(name)} for ${subject}`, hidden: false });
    note.textContent = WORDS[name] ?? "";
    if (two) note.append(` They share ${percent(overlap)} of what they look at.`);
    else if (parts.length > 1 && name in scores) note.append(` It gives ${subject} ${percent(scores[name])}.`);
    if (cut) note.append(" The network saw the middle of the picture alone.");
    scale.replaceChildren(low, make("i", { class: two ? "two" : null, "aria-hidden": "true" }), high);
  };

  card.bare();
  if (box) outline(card, [{ box, colour: "#ffffff" }]);
  card.mark(subject);
  const kept = [card.kept, "fused"].find((name) => names.includes(name)) ?? names[0];
  const title = `What spoke for ${subject}`;
  const group = `heat ${++groups}`;
  const segments = names.map((name) => {
    const checked = name === kept;
    const attributes = { type: "radio", name: group, value: name, checked, change: () => see(name) };
    return make("label", {}, make("input", attributes), make("span", {}, word(name)));
  });
  const strength = slider("Heat map over the picture", 0, 100, card.strength ?? STRENGTH, (value) => {
    card.strength = value;
    card.stage.style.setProperty("--heat", value / 100);
  });
  const back = button("Back to the picture", () => hide(card));
  card.heats.replaceChildren(
    ...(explanations.length > 1 ? [choice(card, explanations, which)] : []),
    names.length < 2
      ? make("p", { class: "subject" }, title)
      : make("fieldset", {}, make("legend", {}, title), make("div", { class: "segments" }, ...segments)),
    note,
    strength,
    scale,
    make("div", { class: "row" }, back, saver(card)),
  );
  see(kept);
  say(`${card.name}: heat maps for ${subject}: ${names.map(word).join(", ")}`);
}

/** Of several things explained, which one is shown. */
function choice(card, explanations, which) {
  const options = explanations.map(({ subject }, index) =>
    make("option", { selected: index === which }, `${index + 1}. ${subject}`),
  );
  const change = (event) => {
    show(card, explanations, event.target.selectedIndex);
    card.heats.querySelector("select").focus();
  };
  return make("select", { "aria-label": "What is explained", change }, ...options);
}
