// The page of routes: this server's own /openapi.json as headings and tables.

import * as api from "./api.js";
import { $, make, say, show } from "./dom.js";

const LIMITS = [["minimum", "maximum", ""], ["minLength", "maxLength", " characters"], ["minItems", "maxItems", " entries"]];
const SAMPLES = {
  "/v1/vqa": "curl -F image=@scan.png -F question='is there a fracture?' -F attention_map=true ORIGIN/v1/vqa",
  "/v1/image": "curl -F image=@scan.dcm -F window=40 -F window=400 ORIGIN/v1/image",
  "/v1/chat/completions": [
    "from openai import OpenAI", "",
    "client = OpenAI(base_url='ORIGIN/v1', api_key=KEY)",
    "image = {'type': 'image_url', 'image_url': {'url': 'data:image/png;base64,' + DATA}}",
    "question = {'type': 'text', 'text': 'which organ is shown?'}",
    "client.chat.completions.create(model=client.models.list().data[0].id,",
    "                               messages=[{'role': 'user', 'content': [question, image]}])",
  ].join("\n"),
};
let schemas = {};

const resolve = (schema) => (schema.$ref ? schemas[schema.$ref.split("/").pop()] : schema);
const nameOf = (schema) => schema.$ref && schema.$ref.split("/").pop();

// A schema's kind in words: "number, at least 0" or "list of TextPart".
function kind(schema) {
  const several = schema.anyOf || schema.oneOf;
  if (several) return several.filter((one) => one.type !== "null").map(kind).join(" or ") || "null";
  if (schema.$ref) return nameOf(schema);
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((one) => JSON.stringify(one)).join(", ");
  const base = schema.type === "array" ? `list of ${schema.items ? kind(schema.items) : "any"}` : schema.format === "binary" ? "file" : schema.type || "any";
  return [base, ...limits(schema)].join(", ");
}

function limits(schema) {
  const known = (value) => value !== undefined && Math.abs(value) <= Number.MAX_SAFE_INTEGER;
  const found = LIMITS.flatMap(([least, most, unit]) => {
    const [low, high] = [schema[least], schema[most]].map((value) => (known(value) ? value.toLocaleString("en") : null));
    if (low !== null && high !== null) return [low === high ? `${low}${unit}` : `${low} to ${high}${unit}`];
    if (low !== null) return [`at least ${low}${unit}`];
    return high === null ? [] : [`up to ${high}${unit}`];
  });
  return known(schema.exclusiveMinimum) ? [`above ${schema.exclusiveMinimum}`, ...found] : found;
}

// Text whose names stand in backticks.
function prose(text) {
  return text.split("`").map((part, at) => (at % 2 ? make("code", {}, part) : part));
}

// needed: whether it is a body, whose fields somebody has to fill.
function table(schema, needed) {
  const required = new Set(schema.required || []);
  const rows = Object.entries(schema.properties || {}).map(([name, field]) => {
    const words = [resolve(field).type === "null" ? "must be absent or null" : kind(field)];
    if (field.default !== undefined && field.default !== null) words.push(`default ${JSON.stringify(field.default)}`);
    if (field.description) words.push(field.description);
    return make("tr", {}, make("td", {}, make("code", {}, name)),
      needed ? make("td", {}, required.has(name) ? "yes" : "") : null, make("td", {}, ...prose(words.join(". "))));
  });
  const head = make("tr", {}, ...["Field", ...(needed ? ["Needed"] : []), "What"].map((text) => make("th", { scope: "col" }, text)));
  const scrolls = { className: "table", tabIndex: 0, role: "region", "aria-label": "Fields" };
  return make("div", scrolls, make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));
}

// All named schemas that one leads to, itself first.
function within(schema, found = new Map()) {
  const name = nameOf(schema), here = resolve(schema);
  if (name && found.has(name)) return found;
  if (name && here.properties) found.set(name, here);
  const inside = [...Object.values(here.properties || {}), ...(here.anyOf || []), ...(here.oneOf || []), ...(here.items ? [here.items] : [])];
  for (const one of inside) within(one, found);
  return found;
}

function described(title, schema, needed) {
  const parts = [...within(schema)].flatMap(([name, one], at) => [
    make("h3", {}, at ? name : `${title}: ${name}`),
    one.description ? make("p", { className: "quiet" }, ...prose(one.description)) : "",
    table(one, needed),
  ]);
  return parts.length ? make("details", { className: "more" }, make("summary", {}, title), ...parts) : "";
}

function route(path, method, about) {
  const bodies = Object.entries(about.requestBody ? about.requestBody.content : {});
  const good = about.responses["200"]?.content?.["application/json"]?.schema;
  const parameters = (about.parameters || []).map((one) => make("p", { className: "quiet" }, make("code", {}, one.name), ` in the ${one.in}: ${kind(one.schema)}`));
  const sample = SAMPLES[path]?.replace("ORIGIN", new URL(".", location.href).href.replace(/\/$/, ""));
  return make("section", { className: "card", "aria-label": `${method.toUpperCase()} ${path}` },
    make("div", { className: "route" }, make("span", { className: "method" }, method.toUpperCase()), make("h2", {}, make("code", {}, path)),
      make("span", { className: "quiet" }, about.summary || "")),
    ...parameters,
    sample ? make("pre", { tabIndex: 0 }, make("code", {}, sample)) : "",
    ...bodies.map(([media, body]) => described(`Body as ${media}`, body.schema, true)),
    good ? described("Answer", good, false) : "",
    make("p", { className: "quiet" }, `Statuses: ${Object.keys(about.responses).join(", ")}`));
}

async function load() {
  show($("problem"), false);
  try {
    const found = await api.description();
    schemas = found.components.schemas;
    const all = Object.entries(found.paths).flatMap(([path, methods]) => Object.entries(methods).map(([method, about]) => route(path, method, about)));
    $("about").textContent = `${found.info.title} ${found.info.version} · OpenAPI ${found.openapi}`;
    $("routes").replaceChildren(...all);
    show($("key-panel"), false);
    say(`${all.length} routes`);
  } catch (error) {
    if (!(error instanceof api.Problem)) throw error;
    show($("key-panel"), error.code === "unauthorized");
    if (error.code === "unauthorized") $("key").focus();
    show($("problem"), true);
    $("problem").textContent = error.message;
  }
}

function useKey() {
  api.setKey($("key").value);
  $("key").value = "";
  load();
}

$("use-key").addEventListener("click", useKey);
$("key").addEventListener("keydown", (event) => event.key === "Enter" && useKey());
load();
