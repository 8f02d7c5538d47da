// Small pieces of a page, and numbers as people read them. Styles are set through the CSSOM, text through text nodes:
// the strictest Content-Security-Policy holds and no name of a file or class is ever read as HTML.

export const at = (id) => document.getElementById(id);

/** Set attributes; functions become listeners, false, null and undefined are left out. */
export function set(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  return element;
}

/** An element with attributes, as `set` takes them, and children; null among them is left out. */
export function make(tag, attributes = {}, ...children) {
  const element = set(document.createElement(tag), attributes);
  element.append(...children.filter((child) => child !== null));
  return element;
}

export const button = (text, click, attributes = {}) => make("button", { type: "button", click, ...attributes }, text);

/** A dot or mark in a colour. */
export function swatch(colour, kind = "") {
  const spot = make("i", { class: `swatch ${kind}`, "aria-hidden": "true" });
  spot.style.background = colour;
  return spot;
}

/** A name and a number on one line, the name after a swatch where there is one. */
export function line(spot, name, value) {
  const words = make("span", { class: "name" }, spot, name);
  return make("span", { class: "line" }, words, make("span", { class: "number" }, value));
}

/** What went wrong, on one line, with a button to try again. */
export function failure(message, again, of) {
  const retry = button("Try again", again, { "aria-label": `Try again: ${of}` });
  return make("div", { class: "note failed" }, make("p", {}, message), retry);
}

/** A slider in percent with its name and value; `change` is told the value, at once and whenever it moves. */
export function slider(name, least, most, value, change) {
  const output = make("span", { class: "number", "aria-hidden": "true" });
  const input = make("input", { type: "range", min: least, max: most, value, "aria-label": name });
  const moved = () => {
    output.textContent = `${input.value}%`;
    input.setAttribute("aria-valuetext", `${input.value} percent`);
    change(Number(input.value));
  };
  input.addEventListener("input", moved);
  moved();
  return make("label", { class: "slider" }, make("span", {}, name), output, input);
}

/** Have screen readers say what the page shows elsewhere. */
export function say(text) {
  at("said").textContent = text;
}

/** The name of a branch or a map as people read it. */
export const word = (name) => name.charAt(0).toUpperCase() + name.slice(1);

export const number = (value) => value.toLocaleString("en");
export const counted = (count, one, many = `${one}s`) => `${number(count)} ${count === 1 ? one : many}`;
export const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.0995 ? 1 : 0)}%`;
export const bytes = (count) => (count < 1e6 ? `${Math.ceil(count / 1e3)} kB` : `${(count / 1e6).toFixed(1)} MB`);
