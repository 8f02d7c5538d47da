// The page of `chiasm serve`: pictures in, answers beside them. Plain DOM; every request goes to the server it came from.
// Styles are set through the CSSOM and text through text nodes, so that the strictest Content-Security-Policy holds.

const PARALLEL = 3; // pictures asked about at a time
const PATIENCE = 20; // times that a picture is sent again because the server is busy
const WEAKEST = 5; // objects are asked for from this score on, in percent; the slider starts at SURE
const SURE = 50;
const TAGGED = 12; // so many objects bear their names on the picture
const FINEST = 1600; // longest side of the layer that masks are painted on, in pixels
const WORDS = { conv: "Conv", tokens: "Tokens", model: "Model", fused: "Fused", disagreement: "Disagreement" };
const SEEN = {
  conv: "What the convolutions found: local detail.",
  tokens: "What self-attention gathered: the picture as a whole.",
  model: "What in the picture spoke for it.",
  fused: "Both branches together.",
};
const VOICES = ["var(--first)", "var(--second)", "var(--third)"];

const at = (id) => document.getElementById(id);
const state = { models: [], model: null, limits: {}, cards: [], waiting: [], running: 0, resting: 0 };

// ---------------------------------------------------------------- small tools

/** An element with attributes (functions become listeners, false and null are left out) and children. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  set(element, attributes);
  element.append(...children.filter((child) => child !== null));
  return element;
}

function set(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
}

const word = (name) => WORDS[name] ?? name.charAt(0).toUpperCase() + name.slice(1);
const number = (value) => value.toLocaleString("en");
const counted = (count, one, many = `${one}s`) => `${number(count)} ${count === 1 ? one : many}`;
const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.0995 ? 1 : 0)} %`;

function bytes(count) {
  return count < 1e6 ? `${Math.ceil(count / 1e3)} kB` : `${(count / 1e6).toFixed(1)} MB`;
}

/** Said by screen readers; the page shows it elsewhere. */
function say(text) {
  at("said").textContent = text;
}

const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

// ---------------------------------------------------------------- the server

/** What the server, or the way to it, refused: one line for people. */
class Refusal extends Error {
  constructor(message, status = 0, after = 0) {
    super(message);
    this.status = status;
    this.after = after; // seconds to wait
  }
}

function savedKey() {
  try {
    return sessionStorage.getItem("chiasm-key");
  } catch {
    return null; // storage can be forbidden
  }
}

/** JSON of one route; `file` is sent as the form field `images`. Throws Refusal. */
async function ask(path, query = {}, file = null, name = "", signal = undefined) {
  const words = new URLSearchParams(Object.entries(query).filter(([, value]) => value !== null));
  const key = savedKey();
  const request = { headers: key ? { Authorization: `Bearer ${key}` } : {}, signal, cache: "no-store" };
  if (file) {
    request.method = "POST";
    request.body = new FormData();
    request.body.append("images", file, name);
  }
  let answer;
  try {
    answer = await fetch(`${path}?${words}`, request);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server does not answer. Is it still running?");
  }
  const body = await answer.json().catch(() => null);
  if (answer.ok && body) return body;
  if (answer.status === 401) at("key").hidden = false;
  const said = body?.error?.message ?? `The server answered with ${answer.status} ${answer.statusText}`.trim();
  throw new Refusal(said, answer.status, Number(answer.headers.get("Retry-After")) || 1);
}

async function meet() {
  at("trouble").hidden = true;
  try {
    const { models, limits } = await ask("v1/models");
    Object.assign(state, { models, limits: limits ?? {} });
    state.model = models.find((model) => model.default) ?? models[0];
  } catch (error) {
    at("trouble").hidden = error.status === 401;
    at("trouble").firstElementChild.textContent = error.message;
    say(error.message);
    return;
  }
  at("key").hidden = true;
  at("chooser").hidden = state.models.length < 2;
  at("chooser")
    .querySelector("select")
    .replaceChildren(
      ...state.models.map((model) => make("option", { selected: model === state.model }, model.name)),
    );
  introduce();
  state.cards.filter((card) => card.status === 401).forEach((card) => card.begin());
  turn();
}

/** What the model in use is for. */
function introduce() {
  const { name, task, architecture, labels, branches } = state.model;
  const skill = {
    classify: "names what is in a picture",
    detect: "finds objects and frames them",
    instances: "finds objects and outlines them",
    segment: "colours a picture by what each part is",
  };
  const parts = branches?.length > 1 ? ` It has ${branches.length} branches: ${branches.map(word).join(" and ")}.` : "";
  at("about").textContent = `${name === architecture ? name : `${name} (${architecture})`} ${skill[task] ?? ""}.${parts}`;
  document.title = `chiasm: ${name}`;
  at("classes").hidden = !labels?.length;
  at("classes").firstElementChild.textContent = `It knows ${counted(labels.length, "class", "classes")}`;
  at("classes").lastElementChild.replaceChildren(...labels.map((label) => make("li", {}, label)));
}

/** Let the next pictures go, a few at a time; nobody goes while the server asks for a rest. */
function turn() {
  const rest = state.resting - Date.now();
  if (rest > 0) {
    setTimeout(turn, rest + 5);
    return;
  }
  while (state.model && state.running < PARALLEL && state.waiting.length) {
    const card = state.waiting.shift();
    state.running += 1;
    card.predict().finally(() => {
      state.running -= 1;
      turn();
    });
  }
}

// ---------------------------------------------------------------- masks

/** Lengths of runs, background first, of COCO's compressed text: base 32, lowest digit first; differences from the 4th. */
function runsOf(text) {
  const runs = [];
  for (let place = 0; place < text.length; ) {
    let value = 0;
    let shift = 0;
    let digit;
    do {
      digit = text.charCodeAt(place++) - 48;
      value |= (digit & 31) << shift;
      shift += 5;
    } while (digit & 32 && place < text.length);
    if (digit & 16) value |= -1 << shift;
    runs.push(runs.length > 2 ? value + runs[runs.length - 2] : value);
  }
  return runs;
}

/** Of each pixel which thing it belongs to (-1: none), later ones on top. Runs go down the columns of the image. */
function owners(things, width, height, step) {
  const across = Math.ceil(width / step);
  const owner = new Int16Array(across * Math.ceil(height / step)).fill(-1);
  for (const thing of things) {
    let start = 0;
    (thing.runs ??= runsOf(thing.mask.counts)).forEach((length, index) => {
      for (let from = start; index % 2 && from < start + length; ) {
        const column = Math.floor(from / height);
        const end = Math.min(start + length, (column + 1) * height);
        if (column % step === 0) {
          const last = end - column * height;
          for (let row = Math.ceil((from - column * height) / step); row * step < last; row++)
            owner[row * across + column / step] = thing.index;
        }
        from = end;
      }
      start += length;
    });
  }
  return { owner, across, step };
}

/** Paint what `owners` found: half transparent, edges full; `lit` (indices, or null for all) stand out. */
function paint(canvas, { owner, across }, colours, inner, edge, lit) {
  const down = owner.length / across;
  Object.assign(canvas, { width: across, height: down });
  const image = new ImageData(across, down);
  const pixels = new Uint32Array(image.data.buffer);
  const inks = colours.map((colour) => Number.parseInt(colour.slice(5, 7) + colour.slice(3, 5) + colour.slice(1, 3), 16));
  for (let place = 0; place < owner.length; place++) {
    const index = owner[place];
    if (index < 0 || (lit && !lit.has(index))) continue;
    const column = place % across;
    const within =
      (column === 0 || owner[place - 1] === index) &&
      (column === across - 1 || owner[place + 1] === index) &&
      (place < across || owner[place - across] === index) &&
      (place + across >= owner.length || owner[place + across] === index);
    pixels[place] = (((within ? inner : edge) << 24) | inks[index]) >>> 0;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// ---------------------------------------------------------------- a picture and its answer

class Card {
  constructor(file, name) {
    Object.assign(this, { file, name, status: 0, tries: 0, answer: null, explained: new Map() });
    this.url = URL.createObjectURL(file);
    this.element = at("card").content.firstElementChild.cloneNode(true);
    this.part = (selector) => this.element.querySelector(selector);
    this.body = this.part(".answer");
    this.stage = this.part(".stage");
    this.heats = this.part(".heats");
    this.verdict = this.part(".verdict");
    this.part("h2").textContent = name;
    set(this.element, { "aria-label": name });
    set(this.part(".remove"), { "aria-label": `Remove ${name}`, click: () => this.remove() });
    set(this.part(".picture"), { alt: `The picture ${name}` });
    this.seen = new Promise((done) => {
      const picture = this.part(".picture");
      picture.addEventListener("load", () => done(this.frame(picture.naturalWidth, picture.naturalHeight)));
      picture.addEventListener("error", () => done(this.element.classList.add("unseeable"))); // formats only the server reads
      picture.src = this.url;
    });
    this.begin();
  }

  /** Give the stage the picture's shape, so that all layers lie on each other. */
  frame(width, height) {
    Object.assign(this, { width, height });
    this.stage.style.setProperty("--ratio", width / height);
    this.part("h2").replaceChildren(this.name, make("small", {}, ` · ${number(width)} × ${number(height)} pixels`));
  }

  /** Wait for a turn, then ask the model in use; a later beginning makes an earlier answer void. */
  begin() {
    this.stop?.abort();
    this.stop = new AbortController();
    this.model = null;
    this.tries = 0;
    this.status = 0;
    this.explained.clear();
    this.shown = this.subject = this.calm = this.stage.onpointermove = this.stage.onpointerleave = null;
    this.clean();
    this.tell("Waiting for its turn …");
    if (!state.waiting.includes(this)) state.waiting.push(this);
    turn();
  }

  async predict() {
    const { signal } = this.stop;
    this.model = state.model;
    this.tell("Looking …");
    try {
      this.check();
      await this.seen;
      this.check();
      const objects = ["detect", "instances"].includes(this.model.task);
      const query = { model: this.model.name, threshold: objects ? WEAKEST / 100 : null };
      const { results } = await ask("v1/predict", query, this.file, this.name, signal);
      if (results[0].error) throw new Refusal(results[0].error.message, 422);
      if (signal.aborted) return;
      this.answer = results[0];
      this.frame(this.answer.width, this.answer.height);
      const { task } = this.model;
      say(`${this.name}: ${task === "classify" ? showClasses(this) : task === "segment" ? showRegions(this) : showObjects(this)}`);
    } catch (error) {
      if (signal.aborted) return;
      if (error.status === 429 && this.tries++ < PATIENCE) {
        state.resting = Date.now() + 1000 * error.after;
        state.waiting.unshift(this);
        this.tell(`The server is busy. Trying again in ${counted(error.after, "second")} …`);
      } else this.fail(error);
    }
  }

  /** What the server would refuse is not sent. Throws Refusal. */
  check() {
    const most = state.limits;
    if (!this.file.size) throw new Refusal(`${this.name} is empty.`);
    if (this.file.size > most.bytes)
      throw new Refusal(`${this.name} has ${bytes(this.file.size)}; the server takes up to ${bytes(most.bytes)}. Send a smaller picture.`);
    if (this.width * this.height > most.pixels)
      throw new Refusal(
        `${this.name} has ${number(this.width)} × ${number(this.height)} pixels; the server takes up to ` +
          `${number(Math.floor(most.pixels / 1e4) / 100)} megapixels. Send a smaller picture.`,
      );
  }

  /** A line where the answer will be. */
  tell(text) {
    this.element.setAttribute("aria-busy", "true");
    this.empty();
    this.body.replaceChildren(make("p", { class: "waiting" }, text));
  }

  fail(error) {
    this.status = error.status ?? 0;
    this.element.removeAttribute("aria-busy");
    this.empty();
    const again = () => {
      this.element.focus();
      this.begin();
    };
    const line = error instanceof Refusal ? error.message : `Something went wrong on this page: ${error.message}`;
    if (!(error instanceof Refusal)) console.error(error);
    this.element.classList.add("failing");
    this.body.replaceChildren(failure(line, again, this.name));
    say(`${this.name}: ${line}`);
  }

  empty() {
    this.element.classList.remove("failing");
    this.verdict.hidden = true;
    this.heats.replaceChildren();
  }

  /** The answer below its headline. */
  show(...pieces) {
    this.element.removeAttribute("aria-busy");
    this.body.replaceChildren(...pieces.filter((piece) => piece !== null));
    rest(this);
  }

  /** The answer in a few words and a number. */
  head(headline, share) {
    this.verdict.replaceChildren(headline, make("span", {}, ` ${share}`));
    this.verdict.hidden = false;
  }

  /** The bare picture. */
  clean() {
    for (const layer of [".masks", ".heat"]) this.part(layer).hidden = true;
    this.part(".boxes").replaceChildren();
    this.part(".tags").replaceChildren();
    this.stage.style.setProperty("--heat", 0);
  }

  remove() {
    const next = this.element.nextElementSibling ?? this.element.previousElementSibling ?? at("zone");
    this.drop();
    next.focus();
    say(`${this.name} removed`);
  }

  drop() {
    this.stop.abort();
    URL.revokeObjectURL(this.url);
    this.element.remove();
    state.cards = state.cards.filter((card) => card !== this);
    state.waiting = state.waiting.filter((card) => card !== this);
    fill();
  }
}

function failure(line, again, name) {
  const button = make("button", { type: "button", "aria-label": `Try again: ${name}`, click: again }, "Try again");
  return make("div", { class: "note failed" }, make("p", {}, line), button);
}

/** The button of a label: what is pressed stands out, and its heat map is asked for. */
function labelButton(attributes, ...children) {
  return make("li", {}, make("button", { type: "button", "aria-pressed": "false", ...attributes }, ...children));
}

const swatch = (colour, kind = "") => {
  const spot = make("i", { class: `swatch ${kind}`, "aria-hidden": "true" });
  spot.style.background = colour;
  return spot;
};

const voice = (card, branch) => VOICES[Math.max(0, (card.model.branches ?? []).indexOf(branch)) % VOICES.length];

// A classifier: labels as bars, a mark on each bar where a branch stands, and how the branches vote. Returns it in words.

function showClasses(card) {
  const { top, branches = {}, agreement } = card.answer;
  const votes = Object.entries(branches).map(([name, list]) => [name, list[0]]);
  const bars = top.map(({ label, score }) => {
    const fill = make("i");
    fill.style.width = `${100 * score}%`;
    const marks = Object.entries(branches).flatMap(([name, list]) => {
      const own = list.find((entry) => entry.label === label);
      if (!own) return [];
      const mark = make("b", { title: `${word(name)}: ${percent(own.probability)}` });
      Object.assign(mark.style, { left: `${100 * own.probability}%`, background: voice(card, name) });
      return [mark];
    });
    return labelButton(
      { "aria-label": `${label}, ${percent(score)}: what spoke for it?`, click: () => explain(card, label), "data-label": label },
      make("span", { class: "line" }, make("span", { class: "name" }, label), make("span", { class: "number" }, percent(score))),
      make("span", { class: "track" }, fill, ...marks),
    );
  });
  let words = `${top[0].label}, ${percent(top[0].score)}.`;
  let ballot = null;
  if (votes.length > 1) {
    const both = votes.length === 2 ? "Both" : "All";
    const sentence = agreement ? `${both} branches vote for ${votes[0][1].label}.` : "The branches disagree.";
    words += ` ${sentence} ${votes.map(([name, vote]) => `${word(name)}: ${vote.label}, ${percent(vote.probability)}`).join("; ")}.`;
    ballot = make(
      "div",
      { class: agreement ? "votes" : "votes apart" },
      make("p", {}, sentence),
      make(
        "ul",
        {},
        ...votes.map(([name, vote]) =>
          make(
            "li",
            {},
            swatch(voice(card, name), "mark"),
            make("span", {}, `${word(name)}: ${vote.label}`),
            make("span", { class: "number" }, percent(vote.probability)),
          ),
        ),
      ),
    );
  }
  card.head(top[0].label, percent(top[0].score));
  card.show(make("ul", { class: "labels", "aria-label": "Labels" }, ...bars), ballot);
  return words;
}

// A detector: masks and boxes over the picture, a list of the objects, and the score from which they are shown.

function showObjects(card) {
  const { objects, legend = [], width, height } = card.answer;
  const colours = new Map(legend.map((entry) => [entry.label, entry.colour]));
  const found = [...objects]
    .sort((one, other) => other.score - one.score)
    .map((object, index) => ({ ...object, index, colour: colours.get(object.label) ?? "#e67e14" }));
  const inks = found.map((object) => object.colour);
  const step = Math.ceil(Math.max(width, height) / FINEST);
  const list = make("ul", { class: "labels" });
  const scroll = make("div", { class: "scroll", role: "group", "aria-label": "Objects; arrow keys go from one to the next" }, list);
  let shown = [];
  let layer = null;

  const light = (index) => {
    card.lit = index;
    if (card.shown) return; // a heat map is on
    const masks = shown.some((object) => object.mask);
    card.part(".masks").hidden = !masks;
    if (masks) paint(card.part(".masks"), layer, inks, 110, 255, index === null ? null : new Set([index]));
    const framed = masks ? shown.filter((object) => object.index === index) : shown;
    outline(card, framed, index);
    const named = index === null ? (shown.length > TAGGED ? [] : shown) : shown.filter((object) => object.index === index);
    tag(card, named);
    for (const button of list.querySelectorAll("button"))
      button.setAttribute("aria-pressed", String(Number(button.dataset.index) === index));
  };

  const from = (least) => {
    shown = found.filter((object) => 100 * object.score >= least);
    layer = owners(shown.filter((object) => object.mask).reverse(), width, height, step);
    const counts = new Map();
    for (const { label } of shown) counts.set(label, (counts.get(label) ?? 0) + 1);
    const kinds = [...counts].sort((one, other) => other[1] - one[1]);
    const weaker = found.length - shown.length;
    card.head(
      kinds.length ? kinds.map(([label, count]) => `${number(count)} × ${label}`).join(", ") : "No objects",
      weaker ? `and ${number(weaker)} weaker` : "",
    );
    list.replaceChildren(
      ...shown.map((object, order) =>
        labelButton(
          {
            "data-index": object.index,
            "data-label": object.label,
            tabindex: order ? -1 : 0,
            click: () => light(card.lit === object.index ? null : object.index),
          },
          make(
            "span",
            { class: "line" },
            make("span", { class: "name" }, swatch(object.colour), object.label),
            make("span", { class: "number" }, percent(object.score)),
          ),
        ),
      ),
    );
    scroll.hidden = !shown.length;
    light(null);
  };

  list.addEventListener("keydown", (event) => {
    const move = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const next = move && list.children[[...list.children].indexOf(event.target.parentElement) + move]?.firstElementChild;
    if (!next) return;
    event.preventDefault();
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
  pointed(card, (x, y) => {
    const own = shown.some((object) => object.mask);
    if (own) return layer.owner[Math.floor(y / step) * layer.across + Math.floor(x / step)];
    const inside = shown.filter(({ box }) => x >= box[0] && y >= box[1] && x < box[2] && y < box[3]);
    const area = ({ box }) => (box[2] - box[0]) * (box[3] - box[1]);
    return inside.sort((one, other) => area(one) - area(other))[0]?.index ?? -1;
  }, light);
  card.calm = () => light(card.lit);
  card.subject = () => found[card.lit]?.label ?? null;

  const threshold = slider("Show objects from", WEAKEST, 100, SURE, from);
  const nothing = make("p", { class: "muted" }, "Nothing that this model knows was found.");
  card.show(found.length ? threshold : nothing, scroll);
  return `${card.verdict.textContent}.`;
}

/** Frames of objects, as vector graphics in pixels of the image. */
function outline(card, objects, lit) {
  const space = "http://www.w3.org/2000/svg";
  const boxes = card.part(".boxes");
  boxes.setAttribute("viewBox", `0 0 ${card.width} ${card.height}`);
  boxes.setAttribute("preserveAspectRatio", "none");
  boxes.replaceChildren(
    ...objects.map(({ box: [left, top, right, bottom], colour, index }) => {
      const frame = document.createElementNS(space, "rect");
      set(frame, { x: left, y: top, width: right - left, height: bottom - top, rx: 1, stroke: colour });
      frame.classList.toggle("chosen", index === lit);
      frame.classList.toggle("aside", lit !== null && index !== lit);
      return frame;
    }),
  );
}

/** Names above boxes, or in their upper left, within the picture. */
function tag(card, objects) {
  const tags = card.part(".tags");
  tags.replaceChildren(
    ...objects.map(({ label, score, box: [left, top] }) => {
      const name = make("span", {}, score === undefined ? label : `${label} ${percent(score)}`);
      name.style.top = `${(100 * top) / card.height}%`;
      name.classList.toggle("above", top > 0.08 * card.height);
      if (left > 0.6 * card.width) name.style.right = `${100 * Math.max(0, 1 - left / card.width - 0.4)}%`;
      else name.style.left = `${(100 * left) / card.width}%`;
      return name;
    }),
  );
}

/** Let the mouse on the picture light up what `find` says is at (x, y) in pixels of the image; -1: nothing. */
function pointed(card, find, light) {
  let last = -1;
  const move = (index) => {
    if (index !== last) light(index < 0 ? null : index);
    last = index;
  };
  card.stage.onpointermove = (event) => {
    const { left, top, width, height } = card.stage.getBoundingClientRect();
    const x = ((event.clientX - left) / width) * card.width;
    const y = ((event.clientY - top) / height) * card.height;
    if (x >= 0 && y >= 0 && x < card.width && y < card.height) move(find(x, y));
  };
  card.stage.onpointerleave = () => move(-1);
}

// A segmenter: the picture in the colours of its classes, what they mean, and what share each one has.

function showRegions(card) {
  const { regions, legend = [], width, height } = card.answer;
  const colours = new Map(legend.map((entry) => [entry.label, entry.colour]));
  const inks = regions.map(({ label }) => colours.get(label) ?? "#808080");
  const step = Math.ceil(Math.max(width, height) / FINEST);
  const layer = owners(regions.map((region, index) => ({ ...region, index })), width, height, step);
  const masks = card.part(".masks");
  let alone = null;
  let strength = 0.65;

  const light = (index) => {
    if (card.shown) return;
    masks.hidden = false;
    masks.style.opacity = strength;
    const lit = index ?? alone;
    paint(masks, layer, inks, 255, 255, lit === null ? null : new Set([lit]));
  };
  const list = make(
    "ul",
    { class: "labels", "aria-label": "Classes and their shares of the picture" },
    ...regions.map(({ label, share }, index) =>
      labelButton(
        {
          "data-label": label,
          click: (event) => {
            alone = alone === index ? null : index;
            for (const button of list.querySelectorAll("button"))
              button.setAttribute("aria-pressed", String(button === event.currentTarget && alone === index));
            if (card.shown) explain(card, label);
            else light(null);
          },
        },
        make(
          "span",
          { class: "line" },
          make("span", { class: "name" }, swatch(inks[index]), label),
          make("span", { class: "number" }, percent(share)),
        ),
      ),
    ),
  );
  const where = (x, y) => layer.owner[Math.floor(y / step) * layer.across + Math.floor(x / step)];
  pointed(card, where, (index) => {
    light(index);
    for (const [order, item] of [...list.children].entries()) item.firstElementChild.classList.toggle("pointed", order === index);
  });
  card.calm = () => light(null);
  card.subject = () => (alone === null ? null : regions[alone].label);
  const colouring = slider("Colours", 0, 100, 100 * strength, (value) => {
    strength = value / 100;
    light(null);
  });
  const named = regions.slice(0, 2).map(({ label, share }) => `${label} ${percent(share)}`);
  card.head(`Mostly ${regions[0].label}`, percent(regions[0].share));
  card.show(
    colouring,
    make("div", { class: "scroll" }, list),
  );
  return `${counted(regions.length, "class", "classes")}: ${named.join(", ")}.`;
}

/** A slider in percent with its name and value; `change` is told the value, at once and whenever it moves. */
function slider(name, least, most, value, change) {
  const output = make("output", { class: "number" });
  const input = make("input", { type: "range", min: least, max: most, value, "aria-label": name });
  const moved = () => {
    output.textContent = `${input.value} %`;
    input.setAttribute("aria-valuetext", `${input.value} percent`);
    change(Number(input.value));
  };
  input.addEventListener("input", moved);
  moved();
  return make("label", { class: "slider" }, make("span", {}, name), output, input);
}

// ---------------------------------------------------------------- heat maps

/** Where a card's heat maps will be: the question that brings them. */
function rest(card) {
  const question = card.model.branches?.length > 1 ? "What did each branch see?" : "What did the model see?";
  const see = make("button", { type: "button", class: "main", click: () => explain(card, card.subject?.() ?? null) }, question);
  const buttons = [see, card.model.task === "classify" ? null : saver(card)].filter(Boolean);
  card.heats.replaceChildren(make("div", { class: "row" }, ...buttons));
}

/** Ask for the heat maps of a label, or of what the model said itself, and show them. */
async function explain(card, label) {
  const { signal } = card.stop;
  const held = card.heats.contains(document.activeElement); // a button that is about to go
  const known = card.explained.get(label);
  if (!known) {
    card.heats.setAttribute("aria-busy", "true");
    card.heats.replaceChildren(make("p", { class: "waiting" }, label ? `Looking at what spoke for ${label} …` : "Looking at what spoke for it …"));
  }
  try {
    const found = known ?? (await ask("v1/explain", { model: card.model.name, label }, card.file, card.name, signal)).explanations;
    if (signal.aborted) return;
    if (!found.length) throw new Refusal("There is nothing to explain in this picture.");
    card.explained.set(label, found);
    showHeats(card, found, 0);
    if (held) card.heats.querySelector("input").focus();
  } catch (error) {
    if (signal.aborted) return;
    card.heats.replaceChildren(failure(error.message, () => explain(card, label), `heat maps of ${card.name}`));
    say(`${card.name}: ${error.message}`);
  }
  card.heats.removeAttribute("aria-busy");
}

function showHeats(card, found, which) {
  const { subject, scores, overlap, layers, box } = found[which];
  const names = Object.keys(layers);
  const heat = card.part(".heat");
  const note = make("p", { class: "muted" });
  const ramp = make("i", { "aria-hidden": "true" });
  const ends = [make("span"), make("span")];
  card.clean();
  card.strength ??= 0.85;

  const see = (name) => {
    const two = name === "disagreement";
    const [first, second] = (card.model.branches ?? []).map(word);
    heat.hidden = false;
    heat.src = layers[name];
    heat.alt = `Heat map ${word(name)} of ${subject}`;
    card.shown = { name, subject };
    card.kept = name;
    note.textContent = two ? `Where only one of the two looks.` : SEEN[name] ?? "";
    if (name in scores && names.length > 1) note.append(` It gives ${subject} ${percent(scores[name])}.`);
    if (two && overlap !== null) note.append(` They share ${percent(overlap)} of what they look at.`);
    ramp.classList.toggle("two", two);
    ends[0].textContent = two ? first : "less";
    ends[1].textContent = two ? second : "more";
  };
  const group = `heat-${state.cards.indexOf(card)}-${Math.random()}`;
  const chosen = names.includes(card.kept) ? card.kept : names.includes("fused") ? "fused" : names[0];
  const segments = make(
    "fieldset",
    {},
    make("legend", {}, `What spoke for ${subject}`),
    make(
      "div",
      { class: "segments" },
      ...names.map((name) =>
        make(
          "label",
          {},
          make("input", { type: "radio", name: group, value: name, checked: name === chosen, change: () => see(name) }),
          make("span", {}, word(name)),
        ),
      ),
    ),
  );
  const choice =
    found.length > 1
      ? make(
          "select",
          { "aria-label": "What is explained", change: (event) => (showHeats(card, found, event.target.selectedIndex), card.heats.querySelector("select").focus()) },
          ...found.map((entry, index) => make("option", { selected: index === which }, entry.subject)),
        )
      : null;
  const opacity = slider("Heat map over the picture", 0, 100, Math.round(100 * card.strength), (value) => {
    card.strength = value / 100;
    card.stage.style.setProperty("--heat", card.strength);
  });
  const back = make("button", { type: "button", click: () => hide(card) }, "Back to the picture");
  see(chosen);
  if (box) outline(card, [{ box, colour: "#ffffff", index: 0 }], null);
  for (const button of card.body.querySelectorAll(".labels button")) 
    if (card.model.task === "classify") button.setAttribute("aria-pressed", String(button.dataset.label === subject));
  card.heats.replaceChildren(
    ...[choice, segments, note, opacity, make("div", { class: "ramp muted" }, ends[0], ramp, ends[1]), make("div", { class: "row" }, back, saver(card))].filter(Boolean),
  );
  say(`${card.name}: heat maps of ${subject}: ${names.map(word).join(", ")}`);
}

function hide(card) {
  card.shown = null;
  card.clean();
  if (card.calm) card.calm();
  else for (const button of card.body.querySelectorAll(".labels button")) button.setAttribute("aria-pressed", "false");
  rest(card);
  card.heats.querySelector("button").focus();
}

// ---------------------------------------------------------------- saving

function saver(card) {
  return make("button", { type: "button", "aria-label": `Save the picture ${card.name} as it is shown`, click: () => save(card) }, "Save picture");
}

/** Download the picture with what lies on it, and below it what was said. */
async function save(card) {
  const scale = Math.min(1, 4096 / Math.max(card.width, card.height)) * Math.max(1, Math.floor(640 / Math.max(card.width, card.height)));
  const [width, height] = [Math.round(card.width * scale), Math.round(card.height * scale)];
  const letters = Math.max(14, Math.round(width / 40));
  const canvas = make("canvas", { width, height: height + 2 * letters });
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  const heat = card.shown ? card.strength : 0;
  pen.filter = `grayscale(${0.9 * heat}) brightness(${1 - 0.25 * heat})`;
  pen.drawImage(card.part(".picture"), 0, 0, width, height);
  pen.filter = "none";
  for (const [selector, opacity] of [[".masks", card.part(".masks").style.opacity || 1], [".heat", heat]]) {
    pen.globalAlpha = opacity;
    if (!card.part(selector).hidden) pen.drawImage(card.part(selector), 0, 0, width, height);
  }
  pen.globalAlpha = 1;
  pen.lineWidth = Math.max(2, width / 400);
  for (const frame of card.part(".boxes").children) {
    pen.strokeStyle = frame.getAttribute("stroke");
    pen.strokeRect(...["x", "y", "width", "height"].map((side) => scale * frame.getAttribute(side)));
  }
  pen.fillStyle = "#1b2733";
  pen.font = `${letters}px system-ui, sans-serif`;
  pen.textBaseline = "middle";
  const words = card.shown ? `${word(card.shown.name)}: ${card.shown.subject}` : card.verdict.textContent;
  pen.fillText(words, letters / 2, height + letters, width - letters);
  const url = URL.createObjectURL(await new Promise((done) => canvas.toBlob(done, "image/png")));
  make("a", { href: url, download: `${card.name.replace(/\.[^.]*$/, "")}-chiasm.png` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

// ---------------------------------------------------------------- pictures come in

function add(files, name = null) {
  const given = [...files];
  if (!given.length) return;
  at("hint").hidden = true;
  const cards = given.map((file) => new Card(file, name ?? file.name));
  state.cards.unshift(...cards);
  at("results").prepend(...cards.map((card) => card.element)); // the newest on top, in the order given
  fill();
  say(`${counted(cards.length, "picture")} added`);
}

/** What depends on whether there are pictures. */
function fill() {
  document.body.classList.toggle("busy", state.cards.length > 0);
  at("clear").hidden = !state.cards.length;
}

function hint(text) {
  at("hint").textContent = text;
  at("hint").hidden = false;
  say(text);
}

for (const input of [at("files"), at("snapshot")])
  input.addEventListener("change", () => {
    add(input.files, input.id === "snapshot" ? "From the camera" : null);
    input.value = ""; // so that the same file can be chosen again
  });
at("zone").addEventListener("click", () => at("files").click());
at("clear").addEventListener("click", () => {
  for (const card of [...state.cards]) card.drop();
  at("zone").focus();
  say("All pictures removed");
});

document.addEventListener("paste", (event) => {
  const { files } = event.clipboardData;
  if (!files.length) return;
  event.preventDefault();
  add(files, files.length === 1 ? "Pasted picture" : null);
});
let within = 0; // elements below the pointer that a drag has entered
document.addEventListener("dragenter", () => document.body.classList.toggle("over", ++within > 0));
document.addEventListener("dragleave", () => document.body.classList.toggle("over", --within > 0));
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  within = 0;
  document.body.classList.remove("over");
  if (event.dataTransfer.files.length) add(event.dataTransfer.files);
  else hint("There was no file in what was dropped. Save the picture first, then drop its file here.");
});

// The camera: phones have their own app for it behind a file field; elsewhere a window shows what it sees.

let film = null;

async function openCamera() {
  at("hint").hidden = true;
  if (matchMedia("(pointer: coarse)").matches) return at("snapshot").click();
  if (!navigator.mediaDevices)
    return hint("The browser gives the camera only to pages over HTTPS or from this machine (127.0.0.1). Choose a picture instead.");
  try {
    film = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment", width: { ideal: 1280 } } });
  } catch (error) {
    const why = {
      NotAllowedError: "The camera was refused. Allow it for this page in the browser's settings, or choose a picture.",
      NotFoundError: "No camera was found. Choose a picture instead.",
      NotReadableError: "The camera is in use by another program. Close it there, or choose a picture.",
    };
    return hint(why[error.name] ?? `The camera cannot be used (${error.message}). Choose a picture instead.`);
  }
  at("viewfinder").querySelector("video").srcObject = film;
  at("viewfinder").showModal();
}

at("camera").addEventListener("click", openCamera);
at("shut").addEventListener("click", () => at("viewfinder").close());
at("viewfinder").addEventListener("close", () => {
  for (const track of film?.getTracks() ?? []) track.stop();
  at("camera").focus();
});
at("shoot").addEventListener("click", () => {
  const video = at("viewfinder").querySelector("video");
  if (!video.videoWidth) return;
  const canvas = make("canvas", { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext("2d").drawImage(video, 0, 0);
  canvas.toBlob(
    (blob) => {
      at("viewfinder").close();
      add([new File([blob], "camera.jpg", { type: "image/jpeg" })], "From the camera");
    },
    "image/jpeg",
    0.92,
  );
});

// ---------------------------------------------------------------- the server's key, its models, the start

at("key").addEventListener("submit", (event) => {
  event.preventDefault();
  try {
    sessionStorage.setItem("chiasm-key", at("key-field").value.trim());
  } catch {
    hint("The browser forbids this page to keep the key for the session; allow its storage.");
  }
  at("key-field").value = "";
  at("key-why").textContent = "The server does not know that key. Type another one."; // seen only if it comes back
  meet();
});
at("trouble").lastElementChild.addEventListener("click", meet);
at("chooser")
  .querySelector("select")
  .addEventListener("change", (event) => {
    state.model = state.models[event.target.selectedIndex];
    introduce();
    for (const card of [...state.cards].reverse()) card.begin();
  });

meet();
