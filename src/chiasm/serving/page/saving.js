// The picture as it is shown, with what lies on it, as a file of one's own.

import { button, make, word } from "./dom.js";

const LARGEST = 4096; // pixels a side
const SMALLEST = 640; // smaller pictures are enlarged by a whole factor

/** The button that saves it. */
export const saver = (card) => button("Save picture", () => save(card), { "aria-label": `Save picture ${card.name}` });

async function save(card) {
  const side = Math.max(card.width, card.height);
  const scale = side > LARGEST ? LARGEST / side : Math.max(1, Math.floor(SMALLEST / side));
  const [width, height] = [Math.round(card.width * scale), Math.round(card.height * scale)];
  const letters = Math.max(14, Math.round(width / 40));
  const canvas = make("canvas", { width, height: height + 2 * letters });
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#ffffff";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  for (const layer of [card.part(".picture"), card.part(".masks"), card.part(".heat")]) {
    const { filter, opacity } = getComputedStyle(layer);
    Object.assign(pen, { filter, globalAlpha: opacity });
    if (!layer.hidden && layer.checkVisibility()) pen.drawImage(layer, 0, 0, width, height);
  }
  Object.assign(pen, { filter: "none", globalAlpha: 1, lineWidth: Math.max(2, width / 400) });
  for (const frame of card.part(".boxes").children) {
    pen.strokeStyle = frame.getAttribute("stroke");
    pen.strokeRect(...["x", "y", "width", "height"].map((name) => scale * frame.getAttribute(name)));
  }
  Object.assign(pen, { fillStyle: "#1b2733", font: `${letters}px system-ui, sans-serif`, textBaseline: "middle" });
  const words = card.shown ? `${word(card.shown.name)}: ${card.shown.subject}` : card.verdict.textContent;
  pen.fillText(words, letters / 2, height + letters, width - letters);
  const url = URL.createObjectURL(await new Promise((done) => canvas.toBlob(done, "image/png")));
  make("a", { href: url, download: `${card.name.replace(/\.[^.]*$/, "")} chiasm.png` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}
