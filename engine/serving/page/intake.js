// Ways in for an image: picked, dropped anywhere on the page, pasted.

import { $, show } from "./dom.js";

export function onImage(take) {
  const input = $("file");
  input.addEventListener("change", () => {
    if (input.files.length) take(input.files[0]);
    input.value = ""; // so that the same file can be picked again
  });
  whenDropped(take);
  document.addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files][0];
    if (!file) return; // text goes where it was meant to
    event.preventDefault();
    take(file);
  });
}

function whenDropped(take) {
  let depth = 0; // dragenter and dragleave come for every element on the way
  const holdsFiles = (event) => event.dataTransfer && [...event.dataTransfer.types].includes("Files");
  const veil = (change) => {
    depth = change === 0 ? 0 : Math.max(0, depth + change);
    show($("veil"), depth > 0);
  };
  document.addEventListener("dragenter", (event) => holdsFiles(event) && veil(1));
  document.addEventListener("dragleave", (event) => holdsFiles(event) && veil(-1));
  document.addEventListener("dragover", (event) => holdsFiles(event) && event.preventDefault());
  document.addEventListener("drop", (event) => {
    veil(0);
    if (!holdsFiles(event)) return;
    event.preventDefault();
    if (event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
  });
}
