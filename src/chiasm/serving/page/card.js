// A picture and its answer, and whose turn it is to be asked about.

import { RANKED, showClasses } from "./classes.js";
import { at, bytes, failure, make, number, say, set } from "./dom.js";
import { offer } from "./heat.js";
import { showObjects, WEAKEST } from "./objects.js";
import { showRegions } from "./regions.js";
import { ask, Refusal, server } from "./server.js";

const PARALLEL = 3; // pictures asked about at a time
const SHOW = { classify: showClasses, detect: showObjects, instances: showObjects, segment: showRegions };

/** All cards on the page. */
export const cards = new Set();

const waiting = [];
let running = 0;

/** Let the next pictures go, once it is known whom to ask. */
export function turn() {
  while (server.model && running < PARALLEL && waiting.length) {
    running += 1;
    const card = waiting.shift();
    card.predict().finally(() => {
      running -= 1;
      turn();
    });
  }
}

export class Card {
  constructor(file, name) {
    Object.assign(this, { file, name, url: URL.createObjectURL(file), explained: new Map() });
    this.element = document.importNode(at("card").content, true).firstElementChild;
    this.stage = this.part(".stage");
    this.verdict = this.part(".verdict");
    this.heats = this.part(".heats");
    this.body = this.part(".answer");
    set(this.part("h2"), { title: name }).textContent = name;
    set(this.element, { "aria-label": name });
    set(this.part(".remove"), { "aria-label": `Remove ${name}`, click: () => this.remove() });
    const picture = set(this.part(".picture"), { alt: name, src: this.url });
    this.seen = picture.decode().then(
      () => this.frame(picture.naturalWidth, picture.naturalHeight),
      () => this.element.classList.add("unseeable"), // no picture, or a kind that only the server reads
    );
    cards.add(this);
    this.begin();
  }

  part(selector) {
    return this.element.querySelector(selector);
  }

  /** Wait for a turn, then ask the model in use; what an earlier beginning was answered is void. */
  begin() {
    this.stop?.abort();
    this.stop = new AbortController();
    this.status = 0;
    this.explained.clear();
    this.subject = () => null; // the label to explain: what is picked
    this.calm = () => {}; // paint what was found again
    this.mark = () => {}; // let the label that is explained stand out
    this.stage.onpointermove = this.stage.onpointerleave = null;
    this.bare();
    this.tell("Waiting for its turn …");
    if (!waiting.includes(this)) waiting.push(this);
    turn();
  }

  async predict() {
    const { signal } = this.stop;
    this.model = server.model;
    const objects = SHOW[this.model.task] === showObjects;
    const query = { model: this.model.name, top: RANKED, threshold: objects ? WEAKEST / 100 : null };
    this.tell("Looking …");
    try {
      this.check();
      await this.seen;
      this.check();
      const wait = (seconds) => signal.aborted || this.tell(`The server is busy. Trying again in ${seconds} s …`);
      const { results } = await ask("v1/predict", query, this, signal, wait);
      if (signal.aborted) return;
      [this.answer] = results;
      this.frame(this.answer.width, this.answer.height);
      say(`${this.name}: ${SHOW[this.model.task](this)}`);
    } catch (error) {
      if (!signal.aborted) this.fail(error);
    }
  }

  /** Give the stage the picture's shape, so that all layers lie on each other. */
  frame(width, height) {
    Object.assign(this, { width, height });
    this.stage.style.setProperty("--ratio", width / height);
    this.part(".size").textContent = `${number(width)} × ${number(height)} pixels`;
  }

  /** What the server would refuse is not sent. Throws Refusal. */
  check() {
    const { name, file, width, height } = this;
    const { limits } = server;
    const refuse = (has, most) => {
      throw new Refusal(`${name} has ${has}, the server takes up to ${most}: send a smaller picture.`);
    };
    if (!file.size) throw new Refusal(`${name} is empty.`);
    if (file.size > limits.bytes) refuse(bytes(file.size), bytes(limits.bytes));
    if (width * height > limits.pixels) {
      refuse(`${number(width)} × ${number(height)} pixels`, `${number(limits.pixels / 1e6)} million`);
    }
  }

  /** A line where the answer will be. */
  tell(text) {
    this.element.setAttribute("aria-busy", "true");
    this.put(make("p", { class: "waiting" }, text));
  }

  fail(error) {
    if (!(error instanceof Refusal)) console.error(error);
    const again = () => {
      this.element.focus();
      this.begin();
    };
    this.status = error.status;
    this.element.removeAttribute("aria-busy");
    this.put(failure(error.message, again, this.name));
    this.element.classList.add("failing");
    say(`${this.name}: ${error.message}`);
  }

  put(piece) {
    this.element.classList.remove("failing");
    this.verdict.hidden = true;
    this.heats.replaceChildren();
    this.body.replaceChildren(piece);
  }

  /** The answer in a few words and a number. */
  head(words, value) {
    this.verdict.replaceChildren(words, " ", make("span", {}, value));
    this.verdict.hidden = false;
  }

  /** The answer below its head; null among the pieces is left out. */
  show(...pieces) {
    this.element.removeAttribute("aria-busy");
    this.body.replaceChildren(...pieces.filter((piece) => piece !== null));
    offer(this);
  }

  /** The picture without what lies on it. */
  bare() {
    this.shown = null; // the heat map that is
    for (const layer of [".masks", ".heat"]) this.part(layer).hidden = true;
    for (const layer of [".boxes", ".tags"]) this.part(layer).replaceChildren();
    this.stage.style.setProperty("--heat", 0);
  }

  /** Take the card off the page, for good. */
  drop() {
    this.stop.abort();
    cards.delete(this);
    if (waiting.includes(this)) waiting.splice(waiting.indexOf(this), 1);
    this.element.remove();
    URL.revokeObjectURL(this.url);
  }

  remove() {
    const next = this.element.nextElementSibling ?? this.element.previousElementSibling ?? at("zone");
    this.drop();
    next.focus();
    say(`${this.name} removed`);
  }
}
