// What a segmenter says: the picture in the colours of its classes, what they mean, and what share each one has.

import { counted, percent, slider } from "./dom.js";
import { explain, hide } from "./heat.js";
import { layerOf, paint } from "./masks.js";
import { coloursOf, picks } from "./picks.js";

const STRENGTH = 65; // of the colours over the picture, in percent, until the slider is moved

/** Show the answer in its card; returns it in words. */
export function showRegions(card) {
  const colourOf = coloursOf(card.answer.legend);
  const regions = card.answer.regions.map(({ label, share, mask }, index) => {
    return { label, mask, index, value: percent(share), colour: colourOf(label) };
  });
  const layer = layerOf(regions, card.width, card.height);
  const canvas = card.part(".masks");
  const draw = (lit) => {
    canvas.hidden = false;
    paint(canvas, layer, regions.map(({ colour }) => colour), 255, lit);
  };
  const list = picks(card, "Classes", layer.at, draw, (index) => explain(card, regions[index].label));
  const colours = slider("Colours", 0, 100, STRENGTH, (value) => {
    canvas.style.opacity = value / 100;
    if (card.shown) hide(card, false);
  });
  list.fill(regions);
  card.calm = list.show;
  card.subject = () => regions[list.picked()]?.label ?? null;
  card.head(`Mostly ${regions[0].label}`, regions[0].value);
  card.show(colours, list.element);
  const largest = regions.slice(0, 3).map(({ label, value }) => `${label} ${value}`);
  return `${counted(regions.length, "class", "classes")}: ${largest.join(", ")}.`;
}
