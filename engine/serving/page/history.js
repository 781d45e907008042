// What was asked, in this page's memory alone: nothing of it is stored, so a reload forgets it.

import { $, make, percent, say, show } from "./dom.js";

const MOST = 40;
let entries = [];

export function onHistory(open) {
  $("entries").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) open(entries[Number(button.dataset.at)]);
  });
  $("forget").addEventListener("click", () => {
    entries = [];
    draw(null);
    say("History forgotten");
    $("question").focus();
  });
}

export function remember(entry) {
  entries = [entry, ...entries].slice(0, MOST);
  draw(entry);
}

// Marks the entry that is shown, if any.
export function draw(current) {
  show($("history"), entries.length > 0);
  $("entries").replaceChildren(...entries.map((entry, at) => {
    const words = make("span", {}, make("span", { className: "said" }, entry.answer.answer || "(no words)"),
      make("span", { className: "asked" }, entry.question));
    const button = make("button", { type: "button", "aria-current": String(entry === current) },
      make("img", { src: entry.seen.png, alt: "" }), words, make("span", { className: "quiet" }, percent(entry.answer.score)));
    button.dataset.at = String(at);
    return make("li", {}, button);
  }));
}
