// Things on a picture and a list of them: the one under the pointer, or else the one picked in the list, stands out.

import { line, make, swatch } from "./dom.js";

/**
 * A list of things ({label, value, colour, index}) linked with the picture of `card`; `fill` puts the things in.
 *
 * `find(x, y)` says which is there, in pixels of the image, -1 for none; `draw(lit)` paints the picture, `lit` an index
 * or null; `press(index)` is told of a thing that is clicked while a heat map lies on the picture. The list is one stop
 * of the tab key; arrow keys go on from there.
 */
export function picks(card, title, find, draw, press) {
  const list = make("ul", { class: "labels" });
  const hint = `${title}; arrow keys go from one to the next`;
  const element = make("div", { class: "scroll", role: "group", "aria-label": hint }, list);
  let picked = null;
  let under = null;

  const show = () => {
    if (!card.shown) draw(under ?? picked);
    for (const item of list.querySelectorAll("button")) {
      item.setAttribute("aria-pressed", String(Number(item.dataset.index) === picked));
      item.classList.toggle("pointed", Number(item.dataset.index) === under);
    }
  };
  const pick = (index) => {
    picked = picked === index ? null : index;
    if (card.shown) press(index);
    show();
  };
  const fill = (things) => {
    picked = under = null;
    list.replaceChildren(
      ...things.map(({ label, value, colour, index }, order) => {
        const item = make("button", { type: "button", "data-index": index, tabindex: order ? -1 : 0 });
        item.append(line(swatch(colour), label, value));
        item.addEventListener("click", () => pick(index));
        return make("li", {}, item);
      }),
    );
    element.hidden = !things.length;
    show();
  };

  list.addEventListener("keydown", (event) => {
    const buttons = [...list.querySelectorAll("button")];
    const here = buttons.indexOf(event.target);
    const next = { ArrowDown: here + 1, ArrowUp: here - 1, Home: 0, End: buttons.length - 1 }[event.key];
    if (!buttons[next]) return;
    event.preventDefault();
    event.target.tabIndex = -1;
    buttons[next].tabIndex = 0;
    buttons[next].focus();
  });
  const point = (index) => {
    if ((index < 0 ? null : index) === under) return;
    under = index < 0 ? null : index;
    show();
  };
  card.stage.onpointerleave = () => point(-1);
  card.stage.onpointermove = (event) => {
    const { left, top, width, height } = card.stage.getBoundingClientRect();
    const x = ((event.clientX - left) / width) * card.width;
    const y = ((event.clientY - top) / height) * card.height;
    point(x >= 0 && y >= 0 && x < card.width && y < card.height ? find(x, y) : -1);
  };
  return { element, fill, show, picked: () => picked };
}

/** The colour of each class by its name, '#rrggbb', as the API's legend says. */
export function coloursOf(legend) {
  const colours = new Map(legend.map(({ label, colour }) => [label, colour]));
  return (label) => colours.get(label) ?? "#e67e14";
}
