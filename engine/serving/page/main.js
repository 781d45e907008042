// The page: an image, a question, an answer. Wires the other modules; what they show stands in them.

import * as api from "./api.js";
import { clearAnswer, showAnswer } from "./answer.js";
import { $, duration, make, say, show } from "./dom.js";
import { onHeat, showHeat } from "./heat.js";
import * as history from "./history.js";
import { onImage } from "./intake.js";
import { noSeries, onView, showSeries, view } from "./series.js";
import { largestBody, onServer, wantKey, watch } from "./server.js";
import * as stage from "./stage.js";

const EXAMPLES = ["What modality is this image?", "Which organ is shown?", "Is this image normal?", "Is there a fracture?",
  "Which part of the body is this?", "Is there a mass?"];
const FRAMING = 4096; // bytes that a form adds to its file
const RETRIED = new Set(["queue_full", "not_ready", "draining", "restarted", "deadline", "unreachable", "fault", "internal", "out_of_memory",
  "unauthorized"]);
let image = null; // {file, view, seen}; seen: null until the server has read it
let looking = null, asking = null; // AbortControllers of what is under way

function take(file) {
  stopAsking();
  problem("problem", null);
  clearAnswer();
  showHeat(null);
  history.draw(null);
  noSeries();
  stage.empty();
  image = { file, view: { frame: null, window: null }, seen: null };
  look();
}

async function look() {
  const here = image, control = new AbortController();
  looking?.abort();
  looking = control;
  problem("image-problem", null);
  stage.waiting(true);
  try {
    checkSize(here.file);
    here.seen = await api.look(here.file, here.view, control.signal);
    stage.showImage(here.file, here.seen);
    showSeries(here.seen, here.view);
    say(`Image read: ${$("facts").textContent}`);
  } catch (error) {
    if (error.name !== "AbortError") failed("image-problem", error, look);
  } finally {
    if (looking === control) {
      looking = null;
      stage.waiting(false);
    }
  }
}

function checkSize(file) {
  if (file.size + FRAMING > largestBody()) {
    const most = (largestBody() / 2 ** 20).toFixed(0);
    throw new api.Problem("content_too_large", `The file has more bytes than this server takes (${most} MiB).`);
  }
}

function viewChanged() {
  stopAsking();
  clearAnswer();
  showHeat(null);
  history.draw(null);
  image = { ...image, view: view(), seen: null };
  look();
}

function lacking() {
  if (image === null) return ["There is no image yet: drop, paste or choose one.", "file"];
  if (looking) return ["The image is still being read.", "question"];
  if (image.seen === null) return ["The image could not be read: choose another, or another view of it.", "file"];
  if (!$("question").value.trim()) return ["There is no question yet: write one, or take an example.", "question"];
  return null;
}

async function ask() {
  if (asking) return;
  const missing = lacking();
  problem("problem", missing && missing[0]);
  if (missing) {
    $(missing[1]).focus();
    return;
  }
  const asked = {
    question: $("question").value.trim(),
    candidates: $("candidates").value.split("\n").map((line) => line.trim()).filter(Boolean),
    alternatives: Math.min(15, Math.max(0, Math.floor(Number($("alternatives").value)) || 0)),
    heat: $("want-heat").checked,
  };
  const here = image, control = new AbortController();
  busy(control);
  const start = performance.now();
  try {
    const found = await api.ask(here.file, here.view, asked, control.signal);
    const entry = { ...here, question: asked.question, answer: found.answers[0],
      took: (performance.now() - start) / 1000, server: found.seconds, id: found.id };
    showEntry(entry);
    history.remember(entry);
    $("says").scrollIntoView({ block: "nearest" });
  } catch (error) {
    if (error.name !== "AbortError") failed("problem", error, ask);
  } finally {
    if (asking === control) busy(null);
  }
}

function showEntry(entry) {
  showAnswer(entry);
  showHeat(entry.answer.attention);
}

function busy(control) {
  asking = control;
  const on = control !== null, focused = document.activeElement;
  document.body.classList.toggle("asking", on);
  $("answer").setAttribute("aria-busy", String(on));
  show($("cancel"), on);
  $("ask").disabled = on;
  if (on && focused === $("ask")) $("cancel").focus(); // a button that is off has no focus to keep
  if (!on && focused === $("cancel")) $("ask").focus();
  if (on) {
    say("Asking");
    tick(control, performance.now());
  } else {
    $("progress").textContent = "";
  }
}

function tick(control, start) {
  if (asking !== control) return;
  $("progress").textContent = `Asking, ${duration(Math.floor((performance.now() - start) / 100) / 10 || 0.1)}`;
  setTimeout(tick, 100, control, start);
}

// Ends the request itself: the connection closes, and the server frees what it had begun.
function stopAsking() {
  if (!asking) return;
  asking.abort();
  busy(null);
  say("Cancelled");
}

function open(entry) {
  stopAsking();
  looking?.abort();
  problem("problem", null);
  problem("image-problem", null);
  image = { file: entry.file, view: entry.view, seen: entry.seen };
  $("question").value = entry.question;
  stage.showImage(entry.file, entry.seen);
  showSeries(entry.seen, entry.view);
  showEntry(entry);
  history.draw(entry);
  $("answer").focus();
}

function failed(where, error, again) {
  if (!(error instanceof api.Problem)) throw error; // a fault of this page: the browser's console says where
  if (error.code === "unauthorized") wantKey();
  if (RETRIED.has(error.code)) watch();
  problem(where, error.message, error, again);
}

function problem(where, text, error = null, again = null) {
  const box = $(where);
  show(box, text !== null);
  box.replaceChildren();
  if (text === null) return;
  box.append(make("p", {}, text));
  if (error) box.append(make("p", { className: "quiet" }, [error.code, error.id && `request ${error.id}`].filter(Boolean).join(" · ")));
  if (again && error && RETRIED.has(error.code)) box.append(make("button", { type: "button", onclick: again }, "Try again"));
}

function onQuestion() {
  for (const text of EXAMPLES) {
    $("examples").append(make("button", { type: "button", onclick: () => {
      $("question").value = text;
      $("question").focus();
    } }, text));
  }
  $("ask-form").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  $("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      ask();
    }
  });
  $("cancel").addEventListener("click", stopAsking);
  document.addEventListener("keydown", (event) => event.key === "Escape" && stopAsking());
}

function onTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme || (dark.matches ? "dark" : "light")) === "dark";
  const mark = () => $("theme").setAttribute("aria-pressed", String(isDark()));
  $("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    mark();
  });
  dark.addEventListener("change", mark);
  mark();
}

onTheme();
onImage(take);
stage.onSide();
onView(viewChanged);
onHeat();
onQuestion();
history.onHistory(open);
onServer();
