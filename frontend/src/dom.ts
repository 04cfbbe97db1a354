// Elements are built by hand, and text enters them as text only.

export type Child = Node | string | null | undefined | false;
type Props = Record<string, string | number | boolean | null | undefined | EventListener | ((event: never) => void)>;

/** An element; `on...` are listeners, everything else attributes (true: empty; false, null: absent). */
export function h<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  props: Props = {},
  ...children: Child[]
): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value as EventListener);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, String(value));
  }
  element.append(...children.filter((child): child is Node | string => !!child));
  return element;
}

const DRAWINGS: Record<string, string> = {
  error: "M5.6 1h4.8L15 5.6v4.8L10.4 15H5.6L1 10.4V5.6zM8 4v5M8 11.2v1",
  warning: "M8 1.5 15 14.5H1zM8 6v4M8 11.6v1",
  info: "M8 1a7 7 0 1 0 0 14A7 7 0 0 0 8 1zM8 7v5M8 4v1",
  fine: "M8 1a7 7 0 1 0 0 14A7 7 0 0 0 8 1zM4.8 8.2l2.2 2.3 4.2-4.8",
  unseen: "M8 1a7 7 0 1 0 0 14A7 7 0 0 0 8 1zM5 8h6",
  copy: "M5 5h9v10H5zM5 11H2V1h9v4",
  layer: "M1 5l7-3.5L15 5 8 8.5zM1 9l7 3.5L15 9",
  close: "M3 3l10 10M13 3L3 13",
};

/** A drawing beside a word that says the same. */
export function icon(name: string): SVGSVGElement {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  path.setAttribute("d", DRAWINGS[name] ?? "");
  svg.append(path);
  return svg;
}

/**
 * Put other children into an element unless they would be made of the same facts; focus, open details and scrolled
 * places inside are found again by their `data-key`.
 */
export function update(home: HTMLElement, facts: unknown, make: () => Child[]): void {
  const now = JSON.stringify(facts);
  if (made.get(home) === now) return;
  made.set(home, now);
  const focused = home.contains(document.activeElement) ? document.activeElement?.getAttribute("data-key") : null;
  const keyed = (): HTMLElement[] => [...home.querySelectorAll<HTMLElement>("[data-key]")];
  const before = new Map(keyed().map((one) => [one.dataset["key"], one]));
  const scrolled = new Map([...before].map(([key, one]) => [key, [one.scrollLeft, one.scrollTop] as const]));
  home.replaceChildren(...make().filter((child): child is Node | string => !!child));
  for (const one of keyed()) {
    const old = before.get(one.dataset["key"]);
    if (old instanceof HTMLDetailsElement && one instanceof HTMLDetailsElement) one.open = old.open;
    const [left, top] = scrolled.get(one.dataset["key"]) ?? [0, 0];
    if (left || top) one.scrollTo(left, top);
    if (focused && one.dataset["key"] === focused) one.focus({ preventScroll: true });
  }
}
const made = new WeakMap<HTMLElement, string>();

/** Forget what an element was made of, so that the next update makes it anew. */
export function stale(home: HTMLElement): void {
  made.delete(home);
}

/** A table of facts, the first column heading each row. */
export function dataTable(caption: string, columns: string[], rows: string[][]): HTMLElement {
  return h(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    h(
      "table",
      { class: "data" },
      h("caption", { class: "unseen" }, caption),
      h("thead", {}, h("tr", {}, ...columns.map((name) => h("th", { scope: "col" }, name)))),
      h(
        "tbody",
        {},
        ...rows.map((row) =>
          h("tr", {}, ...row.map((cell, at) => (at ? h("td", {}, cell) : h("th", { scope: "row" }, cell)))),
        ),
      ),
    ),
  );
}

/** A data table on demand: made when it is opened, for a chart has thousands of numbers. */
export function onDemand(key: string, make: () => HTMLElement): HTMLDetailsElement {
  const details = h("details", { class: "numbers", "data-key": key }, h("summary", {}, "Show the numbers"));
  details.addEventListener("toggle", () => {
    if (details.open && details.children.length === 1) details.append(make());
  });
  return details;
}

/** What is said where there is nothing to show, and what to do about it. */
export function nothing(what: string, todo?: string | Node): HTMLElement {
  return h("div", { class: "nothing" }, h("p", {}, what), todo ? h("p", { class: "muted" }, todo) : null);
}

const speaker: { element?: HTMLElement } = {};
/** Say something to screen readers. */
export function say(text: string): void {
  if (speaker.element) speaker.element.textContent = text;
}
export function speakThrough(element: HTMLElement): void {
  speaker.element = element;
}
