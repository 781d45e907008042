// The server's routes as functions. The key lives in this module's memory and nowhere else.

let key = "";

export function setKey(text) {
  key = text.trim();
}

// What went wrong, in the server's fixed words; `code` is one of its vocabulary, or "unreachable".
export class Problem extends Error {
  constructor(code, message, status = 0, id = "") {
    super(message);
    this.code = code;
    this.status = status;
    this.id = id;
  }
}

const UNREACHABLE = "The server cannot be reached, or it ended the connection. Is it running?";

async function call(path, options = {}) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  let response;
  try {
    // Never kept by the browser, never sent elsewhere by a redirect.
    response = await fetch(path, { ...options, headers, cache: "no-store", redirect: "error", credentials: "same-origin" });
    if (response.ok) return await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("unreachable", UNREACHABLE);
  }
  throw await refusal(response);
}

async function refusal(response) {
  const told = await response.json().then((body) => body.error, () => null); // a proxy answers in its own way
  const id = response.headers.get("x-request-id") || "";
  if (told && told.message) return new Problem(told.code, told.message, response.status, told.request_id || id);
  return new Problem(`http_${response.status}`, `What stands before the server answered ${response.status}.`, response.status, id);
}

function form(file, { frame, window }) {
  const data = new FormData();
  data.append("image", file, "image"); // the file's own name may hold a patient's
  if (frame !== null) data.append("frame", String(frame));
  if (window) for (const number of window) data.append("window", String(number));
  return data;
}

export const models = () => call("v1/models").then((list) => list.data[0]);
export const version = () => call("version").then((found) => found.version);
export const ready = () => call("ready");
export const description = () => call("openapi.json");

// The pixels that the model is given, and what the file says of itself.
export function look(file, view, signal) {
  return call("v1/image", { method: "POST", body: form(file, view), signal });
}

export function ask(file, view, { question, candidates, alternatives, heat }, signal) {
  const data = form(file, view);
  data.append("question", question);
  data.append("alternatives", String(alternatives));
  data.append("attention_map", String(heat));
  for (const one of candidates) data.append("candidates", one);
  return call("v1/vqa", { method: "POST", body: data, signal });
}
