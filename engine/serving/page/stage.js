// The image on the page: as the model sees it, or the file itself where a browser can show it.

import { $, show } from "./dom.js";

const SHOWN_BY_BROWSERS = new Set(["PNG", "JPEG", "WEBP", "BMP"]);
const NAMES = { WEBP: "WebP" };
let current = null; // {file, seen}
let address = null; // of the file, while it is shown

export function onSide() {
  $("sides").addEventListener("change", draw);
}

export function waiting(on) {
  show($("stage-wait"), on);
  $("stage").setAttribute("aria-busy", String(on));
}

// No image, or none that could be read.
export function empty() {
  current = null;
  release();
  $("stage").dataset.state = "empty";
  for (const id of ["picture", "under", "sides"]) show($(id), false);
}

export function showImage(file, seen) {
  current = { file, seen };
  $("stage").dataset.state = "image";
  for (const id of ["picture", "under"]) show($(id), true);
  show($("sides"), SHOWN_BY_BROWSERS.has(seen.format));
  $("facts").textContent = describe(seen);
  draw();
}

function describe(seen) {
  const parts = [NAMES[seen.format] || seen.format, `${seen.width} × ${seen.height}`];
  if (seen.num_frames > 1) parts.push(`frame ${seen.frame + 1} of ${seen.num_frames}`);
  if (seen.window) parts.push(`window ${seen.window.map((n) => +n.toFixed(2)).join(", ")}`);
  return `${parts.join(" · ")} → ${seen.size} × ${seen.size} for the model`;
}

function release() {
  if (address) URL.revokeObjectURL(address);
  address = null;
}

function draw() {
  const { file, seen } = current;
  const wanted = document.querySelector("input[name=side]:checked").value;
  const own = wanted === "file" && SHOWN_BY_BROWSERS.has(seen.format);
  release();
  const pixels = $("pixels");
  if (own) address = URL.createObjectURL(file);
  pixels.src = own ? address : seen.png;
  pixels.alt = own ? "The image as its file has it" : "The image as the model sees it, stretched to a square";
  // The model's square covers the whole picture, so the map lies right over either.
  const [width, height] = own ? [seen.width, seen.height] : [1, 1];
  const longest = Math.max(width, height);
  $("picture").style.width = `${(100 * width) / longest}cqw`;
  $("picture").style.height = `${(100 * height) / longest}cqh`;
}
