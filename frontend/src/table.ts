// Layers and call sites: sorted, searched, coloured by how much they matter; only the rows in view exist.

import { LayerRow, Layers, num, Statistic } from "./answers";
import { h, icon, nothing, say } from "./dom";
import { css, ink, scale } from "./scale";
import { capital, clean, count, number, shorten } from "./text";
import { onTheme } from "./theme";

export interface Part {
  /** One letter for the run, and its colour; empty where there is one run only. */
  letter: string;
  color: string;
  layers: Layers;
}

export interface Sorting {
  by: string;
  descending: boolean;
}

interface Column {
  key: string;
  title: string;
  help: string;
  value(row: Row): number | string;
  text(row: Row): string;
  matters?: boolean;
  color?: string;
}

interface Row {
  layer: string;
  index: number;
  replica: number;
  order: number;
  parts: (LayerRow | undefined)[];
}

const HEIGHT = 34;
const SPARE = 12;
/** Sorting as the network has it. */
export const ORDER = "order";
/** What is shown first; the others are a tick away. */
const FIRST = ["mean_shift", "std_ratio", "batch_mean", "running_mean", "batch_std", "running_std"];
const COMPARED = ["mean_shift", "std_ratio"];

export class LayerTable {
  readonly element: HTMLElement;
  private readonly search: HTMLInputElement;
  private readonly box: HTMLElement;
  private readonly table: HTMLTableElement;
  private readonly head: HTMLTableSectionElement;
  private readonly body: HTMLTableSectionElement;
  private readonly group: HTMLTableColElement;
  private readonly told: HTMLElement;
  private readonly empty: HTMLElement;
  private readonly chooser: HTMLElement;
  private rows: Row[] = [];
  private shown: Row[] = [];
  private columns: Column[] = [];
  private parts: Part[] = [];
  private statistics: Statistic[] = [];
  private wanted: Set<string> | null = null;
  /** Layers with several call sites. */
  private shared = new Set<string>();
  private selected = "";
  private active = 0;
  private drawn = "";
  /** The rows that exist, by their place; what is above and below them is two rows of the right height. */
  private readonly inDocument = new Map<number, HTMLElement>();
  private readonly above = spacer();
  private readonly below = spacer();
  private headed = "";

  constructor(
    private readonly sorting: Sorting,
    search: string,
    private readonly choose: (layer: string) => void,
    private readonly changed: (sorting: Sorting, search: string) => void,
  ) {
    this.search = h("input", {
      type: "search",
      id: "layer-search",
      placeholder: "encoder/bn",
      autocomplete: "off",
      spellcheck: "false",
      oninput: () => this.arrange(true),
    });
    this.search.value = search;
    this.told = h("p", { class: "muted small", role: "status" });
    this.group = document.createElement("colgroup") as unknown as HTMLTableColElement;
    this.head = h("thead");
    this.body = h("tbody", { onclick: (event: MouseEvent) => this.clicked(event), onkeydown: (event: KeyboardEvent) => this.typed(event) });
    this.table = h("table", { class: "layers", "aria-labelledby": "layers-title" }, this.group, this.head, this.body);
    this.box = h("div", { class: "table-box", tabindex: -1, onscroll: () => this.draw() }, this.table);
    this.empty = h("div", { hidden: true }, nothing("No layer has that in its name.", "Search for a part of a path, such as \u201cconv\u201d, or empty the box."));
    this.chooser = h("details", { class: "chooser" }, h("summary", {}, "Columns"), h("fieldset", {}));
    this.element = h(
      "div",
      { class: "stack" },
      h("div", { class: "tools" }, h("label", { for: "layer-search" }, "Search layers ", this.search), this.chooser, this.told),
      this.box,
      this.empty,
    );
    new ResizeObserver(() => this.draw(true)).observe(this.box);
    onTheme(() => this.draw(true));
  }

  show(parts: Part[], statistics: Statistic[]): void {
    const same = parts.length === this.parts.length && parts.every((part, at) => part.layers === this.parts[at]?.layers && part.letter === this.parts[at]?.letter);
    if (same) return;
    this.parts = parts;
    this.statistics = statistics;
    const rows = new Map<string, Row>();
    parts.forEach((part, at) => {
      for (const one of part.layers.rows) {
        const name = `${one.layer}\u0000${one.index}\u0000${one.replica}`;
        const row = rows.get(name) ?? { layer: one.layer, index: one.index, replica: one.replica, order: rows.size, parts: [] };
        row.parts[at] = one;
        rows.set(name, row);
      }
    });
    this.rows = [...rows.values()];
    const times = new Map<string, number>();
    for (const row of this.rows) times.set(row.layer, (times.get(row.layer) ?? 0) + 1);
    this.shared = new Set([...times].filter(([, sites]) => sites > 1).map(([layer]) => layer));
    this.compose();
    this.arrange(false);
  }

  select(layer: string, reveal: boolean): void {
    if (layer === this.selected && !reveal) return;
    this.selected = layer;
    if (reveal) {
      const at = this.shown.findIndex((row) => row.layer === layer);
      if (at >= 0) {
        this.active = at;
        this.reveal(at);
      }
    }
    this.draw(true);
  }

  private compose(): void {
    const several = this.parts.length > 1;
    const names = (this.parts[0]?.layers.statistics ?? []).filter((name) => name !== "matters");
    const wanted = this.wanted ?? new Set(several ? COMPARED : FIRST);
    const columns: Column[] = [];
    this.parts.forEach((part, at) => {
      const lead = several ? `${part.letter}: ` : "";
      const own = several ? { color: part.color } : {};
      const of = (row: Row): LayerRow | undefined => row.parts[at];
      columns.push({
        key: several ? `${part.letter}.matters` : "matters",
        title: `${lead}Matters`,
        help: "how far the worst number is off, in units of what matters: from 1 on it is a rule's business",
        value: (row) => num(of(row)?.matters),
        text: (row) => (of(row) ? number(of(row)?.matters) : "\u2013"),
        matters: true,
        ...own,
      });
      if (!several) {
        columns.push({
          key: "why",
          title: "Because",
          help: "the number that is farthest off",
          value: (row) => of(row)?.why ?? "",
          text: (row) => shorten(of(row)?.why ?? "", 120),
        });
      }
      for (const name of names) {
        if (!wanted.has(name)) continue;
        const place = part.layers.statistics.indexOf(name);
        const known = this.statistics.find((one) => one.name === name);
        columns.push({
          key: several ? `${part.letter}.${name}` : name,
          title: lead + capital(known?.title ?? name),
          help: known ? `${known.help}${known.unit ? ` (${known.unit})` : ""}` : name,
          value: (row) => num(of(row)?.values[place]),
          text: (row) => number(of(row)?.values[place]),
          ...own,
        });
      }
    });
    this.columns = columns;
    const headed = JSON.stringify([columns.map((column) => [column.key, column.title]), names]);
    if (headed === this.headed) return;
    this.headed = headed;
    this.choices(names, wanted);
    this.group.replaceChildren(
      ...["name", ...columns.map((column) => (column.key === "why" ? "why" : column.matters ? "matters" : "number"))].map((kind) =>
        h("col", { class: kind }),
      ),
    );
    const cell = (key: string, title: string, help: string, color?: string): HTMLElement => {
      const button = h("button", { type: "button", title: help, "data-key": `sort ${key}`, onclick: () => this.sortBy(key) }, title, h("span", { class: "arrow", "aria-hidden": "true" }));
      const made = h("th", { scope: "col", "data-sort": key, class: key === "why" ? "why" : null }, button);
      if (color) made.style.borderTopColor = `var(--${color})`;
      return made;
    };
    this.head.replaceChildren(
      h(
        "tr",
        { "aria-rowindex": 1 },
        cell(ORDER, "Layer", "layers and their call sites in network order"),
        ...columns.map((column) => cell(column.key, column.title, column.help, column.color)),
      ),
    );
    const width = 260 + columns.reduce((sum, column) => sum + (column.key === "why" ? 250 : 100), 0);
    this.table.style.minWidth = `${width}px`;
  }

  private choices(names: string[], wanted: Set<string>): void {
    const set = this.chooser.querySelector("fieldset");
    set?.replaceChildren(
      h("legend", { class: "unseen" }, "Columns of the table"),
      ...names.map((name) => {
        const known = this.statistics.find((one) => one.name === name);
        const box = h("input", {
          type: "checkbox",
          checked: wanted.has(name),
          onchange: () => {
            const next = new Set(this.wanted ?? wanted);
            if (box.checked) next.add(name);
            else next.delete(name);
            this.wanted = next;
            this.compose();
            this.arrange(false);
            this.chooser.querySelector<HTMLInputElement>(`input[name="${CSS.escape(name)}"]`)?.focus();
          },
          name,
        });
        return h("label", { title: known?.help ?? "" }, box, capital(known?.title ?? name));
      }),
    );
  }

  private sortBy(key: string): void {
    const { sorting } = this;
    if (sorting.by === key) sorting.descending = !sorting.descending;
    else Object.assign(sorting, { by: key, descending: key !== ORDER });
    this.arrange(true);
    const title = this.columns.find((column) => column.key === key)?.title ?? "network order";
    say(`Sorted by ${title}, ${sorting.descending ? "largest first" : "smallest first"}`);
  }

  private arrange(byHand: boolean): void {
    const wanted = this.search.value.trim().toLowerCase();
    const { by, descending } = this.sorting;
    const column = this.columns.find((one) => one.key === by);
    const keep = this.rows.filter((row) => row.layer.toLowerCase().includes(wanted));
    const sign = descending && (column || by === ORDER) ? -1 : 1;
    const compare = (one: Row, other: Row): number => {
      if (!column) return sign * (one.order - other.order);
      const [a, b] = [column.value(one), column.value(other)];
      if (typeof a === "string" || typeof b === "string") return sign * String(a).localeCompare(String(b)) || one.order - other.order;
      // what is no number comes last, whichever way
      if (Number.isNaN(a) || Number.isNaN(b)) return Number(Number.isNaN(a)) - Number(Number.isNaN(b)) || one.order - other.order;
      return sign * (a - b) || one.order - other.order;
    };
    this.shown = keep.sort(compare);
    for (const cell of this.head.querySelectorAll<HTMLElement>("th")) {
      const own = cell.dataset["sort"] === (column ? by : ORDER);
      cell.setAttribute("aria-sort", own ? (sign < 0 ? "descending" : "ascending") : "none");
    }
    const all = count(this.rows.length, "call site");
    this.told.textContent = wanted ? `${number(this.shown.length)} of ${all}` : all;
    this.empty.hidden = this.shown.length > 0 || !this.rows.length;
    this.table.setAttribute("aria-rowcount", String(this.shown.length + 1));
    if (byHand) {
      this.active = 0;
      this.box.scrollTop = 0;
      this.changed(this.sorting, this.search.value);
    }
    this.draw(true);
  }
  private draw(anew = false): void {
    const first = Math.max(0, Math.floor(this.box.scrollTop / HEIGHT) - SPARE);
    const last = Math.min(this.shown.length, first + Math.ceil((this.box.clientHeight || 400) / HEIGHT) + 2 * SPARE);
    const key = `${first} ${last}`;
    if (!anew && key === this.drawn) return;
    this.drawn = key;
    const focused = this.body.contains(document.activeElement);
    if (anew) {
      this.inDocument.clear();
      this.body.replaceChildren(this.above, this.below);
    }
    for (const [at, row] of this.inDocument) {
      if (at >= first && at < last) continue;
      row.remove();
      this.inDocument.delete(at);
    }
    const colors = scale("matters", 0, 2);
    let next: HTMLElement = this.below;
    for (let at = last - 1; at >= first; at -= 1) {
      const shown = this.shown[at];
      let row = this.inDocument.get(at);
      if (!row && shown) {
        row = this.row(shown, at, colors);
        this.inDocument.set(at, row);
        this.body.insertBefore(row, next);
      }
      next = row ?? next;
    }
    this.above.style.height = `${first * HEIGHT}px`;
    this.below.style.height = `${(this.shown.length - last) * HEIGHT}px`;
    if (focused) this.body.querySelector<HTMLElement>('button[tabindex="0"]')?.focus({ preventScroll: true });
  }

  private row(row: Row, at: number, colors: ReturnType<typeof scale>): HTMLElement {
    const several = this.shared.has(row.layer);
    const chosen = row.layer === this.selected;
    const site = several ? ` #${row.index}${row.replica ? ` @${row.replica}` : ""}` : "";
    const active = at === Math.min(this.active, this.shown.length - 1);
    return h(
      "tr",
      { class: chosen ? "chosen" : "", "data-at": at, "aria-rowindex": at + 2 },
      h(
        "th",
        { scope: "row" },
        h(
          "button",
          { type: "button", tabindex: active ? 0 : -1, "aria-pressed": chosen ? "true" : "false", title: shorten(row.layer, 300) },
          chosen ? icon("layer") : null,
          h("span", { class: "name" }, h("bdi", {}, middle(row.layer))),
          site ? h("span", { class: "site" }, site) : null,
        ),
      ),
      ...this.columns.map((column) => {
        const text = column.text(row);
        const cell = h("td", column.key === "why" ? { class: "why", title: text } : {}, text);
        const value = column.value(row);
        if (column.matters && typeof value === "number" && !Number.isNaN(value)) {
          const color = colors.at(value);
          Object.assign(cell.style, { background: css(color), color: ink(color) });
          if (value >= 1) cell.prepend(h("span", { class: "mark", "aria-label": "matters" , role: "img" }, "\u25b2 "));
        }
        return cell;
      }),
    );
  }

  private clicked(event: MouseEvent): void {
    const row = (event.target as HTMLElement).closest<HTMLElement>("tr[data-at]");
    if (row) this.take(Number(row.dataset["at"]));
  }

  private take(at: number): void {
    const row = this.shown[at];
    if (!row) return;
    this.active = at;
    this.choose(row.layer);
  }

  private typed(event: KeyboardEvent): void {
    const page = Math.floor(this.box.clientHeight / HEIGHT) - 1;
    const move = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    this.active = Math.max(0, Math.min(this.shown.length - 1, this.active + move));
    this.reveal(this.active);
    this.draw(true);
    const button = this.body.querySelector<HTMLElement>('button[tabindex="0"]');
    button?.focus({ preventScroll: true });
    button?.scrollIntoView({ block: "nearest" });
  }

  private reveal(at: number): void {
    const top = at * HEIGHT;
    const room = this.box.clientHeight - this.head.offsetHeight;
    if (top < this.box.scrollTop) this.box.scrollTop = top;
    else if (top + HEIGHT > this.box.scrollTop + room) this.box.scrollTop = top + HEIGHT - room;
  }
}

function spacer(): HTMLElement {
  return h("tr", { class: "spacer", "aria-hidden": "true" }, h("td", {}));
}

// Of a long path the end tells most.
function middle(path: string): string {
  const text = clean(path.length > 400 ? `${path.slice(0, 150)}\u2026${path.slice(-150)}` : path);
  return text.length > 48 ? `${text.slice(0, 16)}\u2026${text.slice(-30)}` : text;
}
