// What tests ask of a page, put into it before its own scripts run.
window.probes = (() => {
  const sent = []; // the fields of forms: of requests with files Chromium tells nobody the bodies
  const real = window.fetch;
  const shown = (value) => (value instanceof File ? value.name : value);
  window.fetch = (path, options) => {
    if (options?.body) sent.push([path, [...options.body.entries()].map(([key, value]) => [key, shown(value)])]);
    return real(path, options);
  };

  // How much is kept, in all the places that there are.
  async function stored() {
    return [localStorage.length, sessionStorage.length, document.cookie.length, (await indexedDB.databases()).length,
      (await caches.keys()).length, (await navigator.serviceWorker.getRegistrations()).length];
  }

  // Events as a browser sends them when a file is dragged or pasted; whether the page let the browser go on.
  function hand(kind, data) {
    const transfer = new DataTransfer(), bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
    transfer.items.add(new File([bytes], "scan.png", { type: "image/png" }));
    const common = { bubbles: true, cancelable: true };
    const event = kind === "paste" ? new ClipboardEvent(kind, { ...common, clipboardData: transfer })
      : new DragEvent(kind, { ...common, dataTransfer: transfer });
    return document.body.dispatchEvent(event);
  }

  // What has the focus, and whether a ring shows it.
  function focused() {
    const here = document.activeElement;
    const near = here.matches(".unseen, .segments input") ? here.parentElement : here;
    const ring = [here, ...near.querySelectorAll("*")].some((one) => getComputedStyle(one).outlineStyle !== "none");
    return [here.id || here.textContent.trim() || here.getAttribute("value") || here.tagName, ring];
  }

  function doubleIds() {
    const ids = [...document.querySelectorAll("[id]")].map((one) => one.id);
    return ids.filter((id, at) => ids.indexOf(id) !== at);
  }

  // Names of elements that others point to, and that are not there.
  function pointersToNothing() {
    const kinds = ["for", "aria-labelledby", "aria-describedby"];
    return [...document.querySelectorAll(kinds.map((kind) => `[${kind}]`).join())]
      .flatMap((one) => kinds.flatMap((kind) => (one.getAttribute(kind) || "").split(" ").filter(Boolean)))
      .filter((id) => !document.getElementById(id));
  }

  const channels = (text) => text.match(/[\d.]+/g).map(Number);
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);

  function ground(element) {
    for (let one = element; one; one = one.parentElement) {
      const found = channels(getComputedStyle(one).backgroundColor);
      if (found.length === 3 || found[3] === 1) return found;
    }
    return [255, 255, 255];
  }

  // Visible texts of a contrast under 4.5 to 1 (WCAG 1.4.3), but of what is off.
  function faint() {
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
    while (walker.nextNode()) {
      const text = walker.currentNode.data.trim(), element = walker.currentNode.parentElement;
      if (!text || !element.checkVisibility() || element.closest(".unseen, noscript, :disabled")) continue;
      const pair = [luminance(channels(getComputedStyle(element).color)), luminance(ground(element))];
      const contrast = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
      if (contrast < 4.5) found.push([text, contrast]);
    }
    return found;
  }

  // Buttons too low for a finger.
  function low() {
    return [...document.querySelectorAll("button, .as-button")].filter((one) => one.checkVisibility())
      .map((one) => [one.textContent, one.getBoundingClientRect().height]).filter(([, height]) => height < 36);
  }

  const wider = () => document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const open = () => document.querySelectorAll("details").forEach((one) => { one.open = true; });
  return { sent, stored, hand, focused, doubleIds, pointersToNothing, faint, low, wider, open };
})();
