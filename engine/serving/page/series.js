// Frame and window, for files that have them.

import { $, show } from "./dom.js";

const WAIT = 180; // ms of quiet before the server is asked for another view
let timer = 0;
let changed = () => {};

// listener({frame, window}): called when somebody chose another view.
export function onView(listener) {
  changed = () => {
    clearTimeout(timer);
    timer = setTimeout(() => {
      timer = 0;
      listener(view());
    }, WAIT);
  };
  $("frame-slider").addEventListener("input", () => both($("frame-slider").value));
  $("frame").addEventListener("input", () => $("frame").value && both($("frame").value));
  $("preset").addEventListener("change", preset);
  for (const id of ["centre", "width"]) {
    $(id).addEventListener("input", () => {
      $("preset").value = "custom";
      if ($("centre").value && $("width").value) changed();
    });
  }
}

function both(value) {
  $("frame").value = $("frame-slider").value = value;
  changed();
}

function preset() {
  const chosen = $("preset").value;
  if (chosen === "custom") {
    $("centre").focus();
    return;
  }
  [$("centre").value, $("width").value] = chosen ? chosen.split(",") : ["", ""];
  changed();
}

// {frame, window} as the controls stand; null: as the file says.
export function view() {
  const [centre, width] = [$("centre").value, $("width").value];
  const asked = !$("windows").hidden && $("preset").value !== "" && centre !== "" && width !== "";
  return {
    frame: $("frames").hidden || !$("frame").value ? null : Number($("frame").value) - 1,
    window: asked ? [Number(centre), Number(width)] : null,
  };
}

export function noSeries() {
  clearTimeout(timer);
  timer = 0;
  for (const id of ["series", "frames", "windows"]) show($(id), false);
  $("preset").value = "";
  for (const id of ["centre", "width", "frame"]) $(id).value = "";
}

// Sets the controls to what is shown; `asked` is the view that was asked for. While somebody goes on choosing, their
// values stand.
export function showSeries(seen, asked) {
  const several = seen.num_frames === null || seen.num_frames > 1;
  show($("frames"), several);
  show($("windows"), seen.windowed);
  show($("series"), several || seen.windowed);
  show($("frame-slider"), seen.num_frames !== null); // without a count there is no end to slide to
  $("frame-slider").max = $("frame").max = seen.num_frames === null ? "" : String(seen.num_frames);
  $("frame-count").textContent = seen.num_frames === null ? "" : `of ${seen.num_frames}`;
  if (asked.window === null) [$("centre").placeholder, $("width").placeholder] = seen.window || ["auto", "auto"];
  if (timer) return;
  $("frame-slider").value = $("frame").value = String(seen.frame + 1);
  const [centre, width] = asked.window || ["", ""];
  if (document.activeElement !== $("centre") && document.activeElement !== $("width")) {
    [$("centre").value, $("width").value] = [centre, width];
  }
  const known = [...$("preset").options].some((option) => option.value === `${centre},${width}`);
  $("preset").value = asked.window === null ? "" : known ? `${centre},${width}` : "custom";
}
