// The server's state in the page's head: whether it answers, which model it has, the key that it wants.

import * as api from "./api.js";
import { $, show } from "./dom.js";

const AGAIN = 2000; // ms between questions to a server that is not ready
const WORDS = { not_ready: ["waiting", "Starting"], draining: ["gone", "Stopping"], unreachable: ["gone", "Not reachable"] };
let timer = 0;
let largest = Infinity; // bytes of a request's body

export const largestBody = () => largest;

export function onServer() {
  $("use-key").addEventListener("click", useKey);
  $("key").addEventListener("keydown", (event) => event.key === "Enter" && useKey());
  return watch();
}

function useKey() {
  api.setKey($("key").value);
  $("key").value = "";
  return watch().then(() => $("key-panel").hidden && $("question").focus());
}

export function wantKey() {
  show($("key-panel"), true);
  $("key").focus();
}

function state(name, text) {
  $("status").dataset.state = name;
  if ($("status").textContent !== text) $("status").textContent = text;
}

// Asks until it is ready; later only where a request failed.
export async function watch() {
  clearTimeout(timer);
  try {
    await api.ready();
    await introduce();
    state("ready", "Ready");
    show($("key-panel"), false);
  } catch (problem) {
    if (!(problem instanceof api.Problem)) throw problem;
    if (problem.code === "unauthorized") {
      state("waiting", "Wants a key");
      wantKey();
      return;
    }
    state(...(WORDS[problem.code] || ["gone", "Not ready"]));
    timer = setTimeout(watch, AGAIN);
  }
}

async function introduce() {
  const [model, version] = await Promise.all([api.models(), api.version()]);
  largest = model.max_body_bytes;
  $("model").textContent = model.id;
  $("about").textContent = `Model ${model.id}, weights ${model.weights_sha256.slice(0, 12) || "unknown"}, ` +
    `preprocessing ${model.processor.slice(0, 12)} · miss ${version}`;
}
