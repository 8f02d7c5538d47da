// What a detector says: masks and boxes over the picture, a list of the objects, the score from which they are shown.

import { make, number, percent, slider } from "./dom.js";
import { outline, tag } from "./frames.js";
import { hide } from "./heat.js";
import { layerOf, paint } from "./masks.js";
import { coloursOf, picks } from "./picks.js";

export const WEAKEST = 5; // objects are asked for from this score on, in percent
const SURE = 50; // and shown from this one on, until the slider is moved
const TAGGED = 12; // so many bear their names on the picture
const INNER = 110; // how opaque masks are, of 255

/** Show the answer in its card; returns it in words. */
export function showObjects(card) {
  const colourOf = coloursOf(card.answer.legend);
  const found = [...card.answer.objects]
    .sort((one, other) => other.score - one.score)
    .map(({ label, score, box, mask }, index) => {
      return { label, score, box, mask, index, value: percent(score), colour: colourOf(label) };
    });
  const colours = found.map(({ colour }) => colour);
  const masked = found.some((object) => object.mask);
  const canvas = card.part(".masks");
  let shown = [];
  let layer = null;

  const draw = (lit) => {
    canvas.hidden = !masked;
    canvas.style.opacity = 1;
    if (masked) paint(canvas, layer, colours, INNER, lit);
    const alone = shown.filter(({ index }) => index === lit);
    outline(card, masked ? alone : shown, lit);
    const crowded = shown.length > TAGGED || (masked && card.model.labels.length === 1);
    tag(card, lit !== null ? alone : crowded ? [] : shown);
  };
  const find = (x, y) => {
    if (masked) return layer.at(x, y);
    const holds = ({ box: [left, top, right, bottom] }) => x >= left && y >= top && x < right && y < bottom;
    const inside = shown.filter(holds).sort((one, other) => area(one) - area(other));
    return inside[0]?.index ?? -1;
  };
  const list = picks(card, "Objects", find, draw, () => hide(card, false));
  const from = (least) => {
    if (card.shown) hide(card, false);
    shown = found.filter(({ score }) => 100 * score >= least);
    layer = layerOf(shown.filter(({ mask }) => mask).reverse(), card.width, card.height);
    const weaker = found.length - shown.length;
    card.head(census(shown), weaker ? `and ${number(weaker)} weaker` : "");
    list.fill(shown);
  };
  card.calm = list.show;
  card.subject = () => found[list.picked()]?.label ?? null;
  const threshold = slider("Show objects from", WEAKEST, 100, SURE, from);
  const nothing = make("p", { class: "muted" }, "Nothing that this model knows was found.");
  card.show(found.length ? threshold : nothing, list.element);
  return `${card.verdict.textContent}.`;
}

const area = ({ box: [left, top, right, bottom] }) => (right - left) * (bottom - top);

/** How many of each class, the most frequent first; a number does not part from its name. */
function census(objects) {
  const counts = new Map();
  for (const { label } of objects) counts.set(label, (counts.get(label) ?? 0) + 1);
  const kinds = [...counts].sort(([, one], [, other]) => other - one);
  return kinds.map(([label, count]) => `${number(count)}\u00a0×\u00a0${label}`).join(", ") || "No objects";
}
