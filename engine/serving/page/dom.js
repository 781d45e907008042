// Small helpers over the document. Text goes in as text, never as markup.

export const $ = (id) => document.getElementById(id);

// make("p", {className: "quiet"}, "text", element): an element with properties, attributes that hold a "-", and children.
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "role" || name.includes("-")) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

export function show(element, visible) {
  element.hidden = !visible;
}

// For screen readers alone.
export function say(text) {
  $("said").textContent = text;
}

export function percent(share) {
  const value = 100 * share;
  if (value > 0 && value < 0.1) return "< 0.1 %";
  if (value > 99.9 && value < 100) return "> 99.9 %";
  return `${value >= 10 && value < 99 ? value.toFixed(0) : value.toFixed(1)} %`;
}

export function duration(seconds) {
  return seconds < 1 ? `${Math.max(1, Math.round(1000 * seconds))} ms` : `${seconds.toFixed(2)} s`;
}
