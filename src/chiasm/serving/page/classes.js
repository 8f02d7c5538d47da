// What a classifier says: labels as bars, a mark on each bar where a branch stands, and how the branches vote.

import { counted, line, make, percent, swatch, word } from "./dom.js";
import { explain } from "./heat.js";

export const RANKED = 20; // labels asked for
const LISTED = 5; // of these in view; the others fold away
const VOICES = ["var(--first)", "var(--second)", "var(--third)"];

/** Show the answer in its card; returns it in words. */
export function showClasses(card) {
  const { top, branches, agreement } = card.answer;
  const voters = Object.entries(branches).map(([name, list], index) => {
    return { name: word(name), list, colour: VOICES[index % VOICES.length] };
  });
  const bars = top.map((entry) => bar(card, entry, voters));
  const more = bars.slice(LISTED);
  card.head(top[0].label, percent(top[0].score));
  card.show(
    listed(bars.slice(0, LISTED)),
    more.length ? make("details", {}, make("summary", {}, counted(more.length, "more label")), listed(more)) : null,
    voters.length > 1 ? ballot(voters, agreement) : null,
  );
  card.subject = () => null;
  card.mark = (label) => {
    for (const button of card.body.querySelectorAll("[data-label]"))
      button.setAttribute("aria-pressed", String(button.dataset.label === label));
  };
  const votes = voters.map(({ name, list: [vote] }) => ` ${name}: ${vote.label}, ${percent(vote.probability)}.`);
  const first = `${top[0].label}, ${percent(top[0].score)}.`;
  return voters.length > 1 ? `${first} ${verdict(voters, agreement)}${votes.join("")}` : first;
}

const listed = (items) => make("ul", { class: "labels", "aria-label": "Labels" }, ...items);

function bar(card, { label, score }, voters) {
  const fill = make("i");
  fill.style.width = percent(score);
  const marks = voters.flatMap(({ name, list, colour }) => {
    const own = list.find((entry) => entry.label === label);
    if (!own) return []; // not among the branch's best
    const spot = make("b", { title: `${name}: ${percent(own.probability)}` });
    Object.assign(spot.style, { left: percent(own.probability), background: colour });
    return [spot];
  });
  const attributes = {
    type: "button",
    "aria-pressed": "false",
    "aria-label": `${label}, ${percent(score)}: what spoke for it?`,
    "data-label": label,
    click: () => explain(card, label),
  };
  const track = make("span", { class: "track" }, fill, ...marks);
  return make("li", {}, make("button", attributes, line(null, label, percent(score)), track));
}

function verdict(voters, agreement) {
  if (!agreement) return "The branches disagree.";
  return `${voters.length === 2 ? "Both" : "All"} branches vote for ${voters[0].list[0].label}.`;
}

function ballot(voters, agreement) {
  const votes = voters.map(({ name, list: [vote], colour }) =>
    make("li", {}, line(swatch(colour, "mark"), `${name}: ${vote.label}`, percent(vote.probability))),
  );
  const sentence = make("p", {}, verdict(voters, agreement));
  return make("div", { class: agreement ? "votes" : "votes apart" }, sentence, make("ul", {}, ...votes));
}
