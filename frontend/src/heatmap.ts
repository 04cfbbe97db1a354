// Every call site over all steps as colours: where and when a statistic goes wrong.

import { Heatmap, num, Statistic } from "./answers";
import { dataTable, h, nothing } from "./dom";
import { prepare } from "./channels";
import { Figure, thinned } from "./figure";
import { css, NOT_A_NUMBER, Scale, scale } from "./scale";
import { capital, count, number, percent, shorten, siteName } from "./text";
import { color, onTheme } from "./theme";

const TALLEST = 22;
const LOWEST = 4;
const ROOM = 420;
const LABELS = 180;

export class HeatmapView {
  private readonly statistic = h("select", { id: "heatmap-statistic", onchange: () => this.pick(this.statistic.value) });
  private readonly canvas = h("canvas", { tabindex: 0, role: "application", "aria-roledescription": "heatmap", height: 120 });
  private readonly cursor = h("div", { class: "cell-cursor", hidden: true });
  private readonly tip = h("div", { class: "tip", hidden: true, "aria-hidden": "true" });
  private readonly inner = h("div", { class: "heat-inner" }, this.canvas, this.cursor);
  private readonly box = h("div", { class: "heat-box" }, this.inner);
  private readonly readout = h("p", { class: "unseen", role: "status" });
  private readonly axis = h("div", { class: "heat-axis", "aria-hidden": "true" });
  private readonly legend = h("div", { class: "heat-legend" });
  private readonly figure = new Figure(
    "heatmap",
    "Layers over steps",
    [h("label", { for: "heatmap-statistic" }, "Statistic ", this.statistic)],
    [this.legend, this.box, this.axis, this.tip, this.readout],
  );
  readonly element = this.figure.element;
  private map: Heatmap | null = null;
  private colors: Scale | null = null;
  private at: [number, number] = [0, 0];
  private selected = { layer: "", step: null as number | null };
  private labels = LABELS;
  private row = TALLEST;

  constructor(
    private readonly pick: (statistic: string) => void,
    private readonly choose: (layer: string, step: number) => void,
  ) {
    new ResizeObserver(() => this.draw()).observe(this.element);
    onTheme(() => this.draw());
    this.canvas.addEventListener("mousemove", (event) => this.point(event));
    this.canvas.addEventListener("mouseleave", () => this.leave());
    this.canvas.addEventListener("click", (event) => {
      if (this.point(event)) this.take();
    });
    this.canvas.addEventListener("focus", () => this.tell(true));
    this.canvas.addEventListener("blur", () => this.leave());
    this.canvas.addEventListener("keydown", (event) => this.typed(event));
  }

  statistics(known: Statistic[], chosen: string): void {
    const names = known.map((one) => one.name).join();
    if (this.statistic.dataset["names"] !== names) {
      this.statistic.dataset["names"] = names;
      this.statistic.replaceChildren(...known.map((one) => h("option", { value: one.name, title: one.help }, capital(one.title))));
    }
    this.statistic.value = chosen;
  }

  loading(): void {
    this.figure.loading();
  }

  failed(message: string): void {
    this.map = null;
    this.figure.blank(nothing("This picture cannot be shown.", message));
  }

  select(layer: string, step: number | null): void {
    if (this.selected.layer === layer && this.selected.step === step) return;
    this.selected = { layer, step };
    this.draw();
  }

  show(map: Heatmap): void {
    this.map = map;
    if (!map.sites.length || !map.steps.length) {
      this.figure.blank(nothing("No step has been sampled yet.", "The picture fills while the training runs."));
      return;
    }
    this.figure.show(this.sentence(map), () => this.numbers(map));
    this.draw();
  }

  private get title(): string {
    return this.statistic.selectedOptions[0]?.textContent ?? this.map?.statistic ?? "";
  }

  private draw(): void {
    const { map } = this;
    if (!map?.sites.length || !map.steps.length || !this.box.clientWidth) return;
    const colors = scale(map.statistic, num(map.low), num(map.high));
    this.colors = colors;
    this.row = Math.max(LOWEST, Math.min(TALLEST, Math.floor(ROOM / map.sites.length)));
    const labelled = this.row >= 12;
    this.labels = labelled ? Math.min(LABELS, this.box.clientWidth / 4) : 0;
    const { context, wide } = prepare(this.canvas, this.row * map.sites.length);
    const cell = (wide - this.labels) / map.steps.length;
    context.fillStyle = color("unknown");
    context.fillRect(this.labels, 0, wide, this.row * map.sites.length);
    context.imageSmoothingEnabled = false;
    context.drawImage(picture(map, colors), this.labels, 0, wide - this.labels, this.row * map.sites.length);
    if (this.row >= 10) {
      context.fillStyle = color("card");
      map.sites.forEach((_, site) => context.fillRect(this.labels, (site + 1) * this.row - 1, wide, 1));
    }
    const shared = new Set(map.sites.filter(([layer], at) => map.sites[at - 1]?.[0] === layer).map(([layer]) => layer));
    map.sites.forEach(([layer, index, replica], site) => {
      const chosen = layer === this.selected.layer;
      if (labelled) {
        context.font = `${chosen ? "600 " : ""}12px system-ui, sans-serif`;
        context.fillStyle = chosen ? color("accent") : color("text");
        context.fillText(fitted(context, siteName(layer, shared.has(layer) ? index : null, replica, 60), this.labels - 10), 0, site * this.row + this.row / 2 + 4);
      }
      if (chosen) {
        context.strokeStyle = color("accent");
        context.lineWidth = 2;
        context.strokeRect(this.labels + 1, site * this.row + 0.5, wide - this.labels - 2, this.row - 1);
      }
    });
    const step = this.selected.step;
    if (step !== null) {
      const column = columnOf(map.steps, step);
      context.fillStyle = color("accent");
      context.fillRect(this.labels + column * cell + cell / 2 - 1, 0, 2, this.row * map.sites.length);
    }
    this.canvas.setAttribute("aria-label", `${this.title}, ${count(map.sites.length, "call site")} over ${count(map.steps.length, "column")} of steps; move with the arrow keys, choose with Enter`);
    this.axis.style.paddingLeft = `${this.labels}px`;
    const middle = map.steps[Math.floor((map.steps.length - 1) / 2)];
    this.axis.replaceChildren(...[...new Set([map.steps[0], middle, map.steps.at(-1)])].map((one) => h("span", {}, `step ${number(one)}`)));
    this.drawLegend(colors, map);
  }

  private drawLegend(colors: Scale, map: Heatmap): void {
    const stops = Array.from({ length: 21 }, (_, at) => {
      const ends = [colors.ticks[0] ?? 0, colors.ticks.at(-1) ?? 1] as const;
      const ratio = map.statistic.endsWith("_ratio");
      const value = ratio ? Math.exp(Math.log(ends[0]) + (at / 20) * Math.log(ends[1] / ends[0])) : ends[0] + (at / 20) * (ends[1] - ends[0]);
      return css(colors.at(value));
    });
    const bar = h("span", { class: "ramp", "aria-hidden": "true" });
    bar.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
    const ticks = h("span", { class: "ticks" }, ...colors.ticks.map((tick) => h("span", {}, number(Number(tick.toPrecision(2))))));
    const odd = map.values.some((values) => values.some((value) => typeof value === "string"));
    const unknown = map.values.some((values) => values.some((value) => value === null));
    const patch = (background: string, text: string): HTMLElement => {
      const made = h("span", { class: "patch", "aria-hidden": "true" });
      made.style.background = background;
      return h("span", { class: "key" }, made, text);
    };
    this.legend.replaceChildren(
      h("span", { class: "scale" }, bar, ticks),
      ...(odd ? [patch(css(NOT_A_NUMBER), "NaN or infinite")] : []),
      ...(unknown ? [patch("var(--unknown)", "not seen")] : []),
    );
  }

  private point(event: MouseEvent): boolean {
    const { map } = this;
    if (!map) return false;
    const column = Math.floor(((event.offsetX - this.labels) / (this.canvas.clientWidth - this.labels)) * map.steps.length);
    const site = Math.floor(event.offsetY / this.row);
    if (!map.sites[site]) return false;
    this.at = [site, Math.max(0, Math.min(map.steps.length - 1, column))];
    this.tell(false);
    return true;
  }

  private typed(event: KeyboardEvent): void {
    const { map } = this;
    if (!map) return;
    const [site, column] = this.at;
    const moves: Record<string, [number, number]> = {
      ArrowRight: [site, column + 1],
      ArrowLeft: [site, column - 1],
      ArrowDown: [site + 1, column],
      ArrowUp: [site - 1, column],
      PageDown: [site + 10, column],
      PageUp: [site - 10, column],
      Home: [site, 0],
      End: [site, map.steps.length - 1],
    };
    const to = moves[event.key];
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.take();
    } else if (to) {
      event.preventDefault();
      this.at = [Math.max(0, Math.min(map.sites.length - 1, to[0])), Math.max(0, Math.min(map.steps.length - 1, to[1]))];
      this.tell(true);
    } else if (event.key === "Escape") this.leave();
  }

  private take(): void {
    const [site, column] = this.at;
    const found = this.map?.sites[site];
    const step = this.map?.steps[column];
    if (found && step !== undefined) this.choose(found[0], step);
  }

  private tell(aloud: boolean): void {
    const { map } = this;
    if (!map) return;
    const [site, column] = this.at;
    const place = map.sites[site];
    if (!place) return;
    const value = map.values[site]?.[column];
    const name = siteName(place[0], place[1], place[2], 90);
    const next = map.steps[column + 1];
    const from = map.steps[column] ?? 0;
    const step = next !== undefined && next - from > 1 ? `steps ${number(from)} to ${number(next - 1)}` : `step ${number(from)}`;
    const text = `${this.title} ${value === null ? "not seen" : number(value)}`;
    const swatch = h("span", { class: "patch" });
    swatch.style.background = value === null || !this.colors ? "var(--unknown)" : css(this.colors.at(num(value)));
    this.tip.replaceChildren(h("strong", {}, name), h("span", {}, step), h("span", {}, swatch, text));
    this.tip.hidden = false;
    if (aloud) this.readout.textContent = `${name}, ${step}: ${text}`;
    const cell = (this.canvas.clientWidth - this.labels) / map.steps.length;
    this.cursor.hidden = false;
    Object.assign(this.cursor.style, {
      left: `${this.labels + column * cell}px`,
      top: `${site * this.row}px`,
      width: `${Math.max(cell, 4)}px`,
      height: `${this.row}px`,
    });
    if (aloud) this.cursor.scrollIntoView({ block: "nearest", inline: "nearest" });
    const canvas = this.inner.getBoundingClientRect();
    const home = this.element.getBoundingClientRect();
    const left = canvas.left - home.left + this.labels + column * cell;
    const top = canvas.top - home.top + (site + 1) * this.row + 8;
    this.tip.style.top = `${top}px`;
    this.tip.style.left = `${Math.max(0, Math.min(left, home.width - this.tip.offsetWidth - 8))}px`;
  }

  private leave(): void {
    this.tip.hidden = true;
    this.cursor.hidden = true;
  }

  private sentence(map: Heatmap): string {
    let [worst, where] = [-1, [0, 0] as [number, number]];
    let odd = 0;
    const ratio = map.statistic.endsWith("_ratio");
    map.values.forEach((values, site) =>
      values.forEach((value, column) => {
        if (typeof value === "string") odd += 1;
        const x = num(value);
        const far = ratio ? Math.abs(Math.log(x)) : Math.abs(x);
        if (Number.isFinite(far) && far > worst) [worst, where] = [far, [site, column]];
      }),
    );
    const place = map.sites[where[0]];
    const far = place ? `Farthest from healthy: ${number(map.values[where[0]]?.[where[1]])} at ${siteName(place[0], place[1], place[2], 80)}, step ${number(map.steps[where[1]])}.` : "";
    const read = map.complete !== undefined && map.complete < 1 ? ` So far ${percent(map.complete, 0)} of the record is in it.` : "";
    return `Each row is a call site, first to last; each column the worst of its steps. ${far}${odd ? ` ${count(odd, "cell")} hold no finite number.` : ""}${read}`;
  }

  private numbers(map: Heatmap): HTMLElement {
    const columns = thinned(map.steps.map((_, at) => at), 12);
    return dataTable(
      this.title,
      ["call site", ...columns.map((at) => `step ${number(map.steps[at])}`)],
      map.sites.slice(0, 200).map(([layer, index, replica], site) => [siteName(layer, index, replica, 80), ...columns.map((at) => number(map.values[site]?.[at]))]),
    );
  }
}

/** The map with a pixel a cell; what was not seen stays transparent. */
function picture(map: Heatmap, colors: Scale): HTMLCanvasElement {
  const made = h("canvas", { width: map.steps.length, height: map.sites.length });
  const context = made.getContext("2d") as CanvasRenderingContext2D;
  const image = context.createImageData(made.width, made.height);
  map.values.forEach((values, site) =>
    values.forEach((value, column) => {
      if (value !== null) image.data.set([...colors.at(num(value)), 255], 4 * (site * made.width + column));
    }),
  );
  context.putImageData(image, 0, 0);
  return made;
}

function columnOf(steps: number[], step: number): number {
  let found = 0;
  while (found + 1 < steps.length && (steps[found + 1] ?? Infinity) <= step) found += 1;
  return found;
}

function fitted(context: CanvasRenderingContext2D, text: string, room: number): string {
  if (context.measureText(text).width <= room) return text;
  let kept = text;
  while (kept.length > 3 && context.measureText(`\u2026${kept}`).width > room) kept = kept.slice(Math.ceil(kept.length / 20));
  return `\u2026${shorten(kept)}`;
}
