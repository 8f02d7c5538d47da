// Frames of objects and their names, over a picture.

import { make, set } from "./dom.js";

/** Frame objects ({box, colour, index}), in pixels of the image; the one that is `lit` stands out. */
export function outline(card, objects, lit = null) {
  const boxes = card.part(".boxes");
  boxes.setAttribute("viewBox", `0 0 ${card.width} ${card.height}`);
  boxes.replaceChildren(
    ...objects.map(({ box: [x, y, right, bottom], colour, index }) => {
      const frame = document.createElementNS("http://www.w3.org/2000/svg", "rect");
      frame.classList.toggle("chosen", index === lit);
      frame.classList.toggle("aside", lit !== null && index !== lit);
      return set(frame, { x, y, width: right - x, height: bottom - y, stroke: colour });
    }),
  );
}

/** Write the labels of objects above their boxes, or into their corners where there is no room above. */
export function tag(card, objects) {
  card.part(".tags").replaceChildren(
    ...objects.map(({ label, value, box: [left, top, right] }) => {
      const words = make("span", { class: top > 0.08 * card.height ? "above" : null }, `${label} ${value}`);
      words.style.top = `${(100 * top) / card.height}%`;
      if (left > 0.6 * card.width) words.style.right = `${100 - (100 * right) / card.width}%`;
      else words.style.left = `${(100 * left) / card.width}%`;
      return words;
    }),
  );
}
