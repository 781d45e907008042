// Where the model looked: one map for the whole answer or for a token, drawn over the image and said in words.

import { $, make, percent, show } from "./dom.js";

const STOPS = [[22, 9, 28], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]]; // dark violet to yellow
const SIDE = 256; // of the drawn map, in pixels
const THIRDS = [["upper left", "upper middle", "upper right"], ["left", "centre", "right"], ["lower left", "lower middle", "lower right"]];
const END = "(end)";
let attention = null;

export function onHeat() {
  $("opacity").addEventListener("input", opacity);
  $("patches").addEventListener("change", draw);
  $("tokens").addEventListener("change", draw);
}

// attention: {tokens, maps, elsewhere} of the answer, or null.
export function showHeat(found) {
  attention = found;
  show($("looked"), found !== null);
  show($("heat"), found !== null);
  $("tokens").replaceChildren();
  if (found === null) return;
  choices(found.tokens);
  opacity();
  draw();
}

function choices(tokens) {
  const choice = (value, text, checked) =>
    make("label", {}, make("input", { type: "radio", name: "token", value, checked }), make("span", {}, text));
  $("tokens").append(choice("all", "Whole answer", true));
  tokens.forEach((token, at) => $("tokens").append(choice(String(at), token === END ? "its end" : token, false)));
}

function opacity() {
  const value = $("opacity").value;
  $("heat").style.opacity = String(value / 100);
  $("opacity-value").textContent = `${value} %`;
  $("opacity").setAttribute("aria-valuetext", `${value} percent`);
}

function draw() {
  if (attention === null) return;
  const { map, elsewhere } = chosen();
  const values = $("patches").checked ? enlarge(map, nearest) : enlarge(map, spline);
  const low = Math.min(...values.map((row) => Math.min(...row)));
  // Up to the strongest patch, but at least to twice what an even spread would be: an even map stays faint.
  const range = Math.max(...values.map((row) => Math.max(...row)), 2 / (map.length * map[0].length)) - low;
  const canvas = $("heat");
  canvas.width = canvas.height = SIDE;
  const image = new ImageData(SIDE, SIDE);
  values.flat().forEach((value, at) => image.data.set(colour((value - low) / range), 4 * at));
  canvas.getContext("2d").putImageData(image, 0, 0);
  $("heat-said").textContent = words(map, elsewhere);
}

function chosen() {
  const { tokens, maps, elsewhere } = attention;
  const value = document.querySelector("input[name=token]:checked").value;
  let which = value === "all" ? tokens.map((_, at) => at).filter((at) => tokens[at] !== END) : [Number(value)];
  if (!which.length) which = tokens.map((_, at) => at); // the answer is its end alone
  const mean = (numbers) => numbers.reduce((sum, n) => sum + n, 0) / numbers.length;
  const map = maps[0].map((row, y) => row.map((_, x) => mean(which.map((at) => maps[at][y][x]))));
  return { map, elsewhere: mean(which.map((at) => elsewhere[at])) };
}

// share: 0, the least, is transparent, so that the image stays to be seen; 1 is the most.
function colour(share) {
  const place = Math.min(share, 0.9999) * (STOPS.length - 1);
  const low = Math.floor(place), part = place - low;
  const mixed = STOPS[low].map((channel, i) => channel + part * (STOPS[low + 1][i] - channel));
  return [...mixed, 255 * Math.min(1, 1.5 * share)];
}

// (rows, columns) -> SIDE x SIDE. weights(position): [index, weight] pairs along one side.
function enlarge(map, weights) {
  const along = (size) => Array.from({ length: SIDE }, (_, at) =>
    weights(((at + 0.5) * size) / SIDE).map(([index, weight]) => [Math.min(size - 1, Math.max(0, index)), weight]));
  const across = along(map[0].length), down = along(map.length);
  const wide = map.map((row) => across.map((taps) => taps.reduce((sum, [i, w]) => sum + w * row[i], 0)));
  return down.map((taps) => wide[0].map((_, x) => taps.reduce((sum, [i, w]) => sum + w * wide[i][x], 0)));
}

function nearest(position) {
  return [[Math.floor(position), 1]];
}

// A cubic B-spline: smooth, never below zero, and honest about size: it blurs by less than a patch.
function spline(position) {
  const base = Math.floor(position - 0.5), t = position - 0.5 - base;
  const weights = [(1 - t) ** 3, 3 * t ** 3 - 6 * t ** 2 + 4, -3 * t ** 3 + 3 * t ** 2 + 3 * t + 1, t ** 3];
  return weights.map((weight, i) => [base - 1 + i, weight / 6]);
}

// What one sees, for who does not: the third of the picture with the most attention, and how sharp it is.
function words(map, elsewhere) {
  const rows = map.length, columns = map[0].length;
  const sums = THIRDS.map((names) => names.map(() => 0));
  map.forEach((row, y) => row.forEach((share, x) => {
    sums[Math.floor((3 * y) / rows)][Math.floor((3 * x) / columns)] += share;
  }));
  const places = sums.flatMap((row, y) => row.map((share, x) => ({ name: THIRDS[y][x], share })));
  const [first, second] = places.sort((a, b) => b.share - a.share);
  const most = Math.max(...map.flat());
  return `Most at the ${first.name} of the picture (${percent(first.share)}), then ${second.name} (${percent(second.share)}). ` +
    `The strongest of ${rows * columns} patches holds ${percent(most)}; spread evenly it would be ${percent(1 / (rows * columns))}. ` +
    `${percent(elsewhere)} went to no patch. It shows where attention went, not what the answer rests on.`;
}
