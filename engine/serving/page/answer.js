// An answer: how sure, what else, what to mind, how long.

import { $, duration, make, percent, say, show } from "./dom.js";

const STEPS = { queue: "waiting", image: "image", question: "question", decode: "answer" };

export function clearAnswer() {
  show($("answer"), false);
  $("answer-body").replaceChildren();
}

// entry: {question, answer, took, id, server}
export function showAnswer(entry) {
  const { answer } = entry;
  const warnings = answer.finished ? answer.warnings : [...answer.warnings, "the answer was cut off: it is longer than it may be"];
  const others = answer.alternatives.map((other) => score(other.answer, other.score, false));
  $("answer-body").replaceChildren(
    make("p", { className: "asked" }, entry.question),
    make("p", { className: "says", id: "says" }, answer.answer || "(no words)"),
    make("div", { className: "scores" }, score("Confidence", answer.score, true)),
    make("p", { className: "quiet" }, "Confidence is the probability that the model gives to exactly these words, not the chance that they are right."),
    others.length ? make("h3", { className: "others-title" }, "Other answers") : "",
    make("div", { className: "scores", id: "others" }, ...others),
    warnings.length
      ? make("ul", { className: "warnings", "aria-label": "Warnings" }, ...warnings.map((text) => make("li", {}, text)))
      : "",
    times(entry),
  );
  show($("answer"), true);
  const warned = warnings.length ? ` Warning: ${warnings.join(". ")}.` : "";
  say(`Answer: ${answer.answer || "no words"}. Confidence ${percent(answer.score)}.${warned}`);
}

function score(text, share, first) {
  const fill = make("i", {});
  fill.style.width = `${100 * Math.min(1, Math.max(0, share))}%`;
  const bar = make("div", { className: "bar", role: "meter", "aria-label": text, "aria-valuemin": "0", "aria-valuemax": "1",
    "aria-valuenow": share.toFixed(4), "aria-valuetext": percent(share) }, fill);
  return make("div", { className: first ? "score first" : "score" }, make("span", {}, text || "(no words)"), make("b", {}, percent(share)), bar);
}

function times(entry) {
  const seconds = entry.answer.seconds;
  const steps = Object.keys(STEPS).filter((name) => seconds[name] > 0.0005).map((name) => `${STEPS[name]} ${duration(seconds[name])}`);
  const rest = entry.server - Object.keys(STEPS).reduce((sum, name) => sum + (seconds[name] || 0), 0);
  if (rest > 0.001) steps.push(`${entry.answer.attention ? "map and the rest" : "the rest"} ${duration(rest)}`);
  const pair = (name, text) => make("div", {}, make("dt", {}, `${name} `), make("dd", {}, text));
  return make("dl", { className: "took" },
    pair("Took", duration(entry.took)),
    pair("on the server", duration(entry.server)),
    steps.length ? pair("of it", steps.join(" · ")) : "",
    make("div", {}, make("dt", {}, "Request "), make("dd", {}, make("code", { id: "request-id" }, entry.id))));
}
