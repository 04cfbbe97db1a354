// Lines over steps: uPlot in the colours of the theme, as wide as its place, with a marked step and evaluations.

import uPlot from "uplot";
import { h } from "./dom";
import { number } from "./text";
import { color, onTheme } from "./theme";

export interface Line {
  label: string;
  /** Name of a colour token. */
  color: string;
  values: (number | null)[];
  dash?: number[];
  width?: number;
  points?: boolean;
  /** Draw on over gaps. */
  join?: boolean;
  /** Not in the legend under the cursor. */
  silent?: boolean;
}

export interface Band {
  /** Lines it lies between, by their number: upper, lower. */
  between: [number, number];
  color: string;
}

export interface Drawing {
  title: string;
  steps: number[];
  lines: Line[];
  bands?: Band[];
  evaluations?: number[];
  marked?: number | null;
  height?: number;
  format?: (value: number) => string;
  range?: [number | null, number | null];
  /** A step was clicked. */
  choose?: (step: number) => void;
}

const WIDTH = 1.5;

export class Chart {
  readonly element: HTMLElement;
  private plot: uPlot | null = null;
  private drawing: Drawing | null = null;
  private readonly canvas: HTMLElement;
  private readonly values: HTMLElement;

  constructor() {
    this.canvas = h("div", { class: "plot" });
    this.values = h("p", { class: "under-cursor", "aria-hidden": "true" });
    this.element = h("div", { class: "chart" }, this.canvas, this.values);
    new ResizeObserver(() => this.fit()).observe(this.element);
    onTheme(() => this.draw(this.drawing));
  }

  draw(drawing: Drawing | null): void {
    this.plot?.destroy();
    this.plot = null;
    this.drawing = drawing;
    this.values.textContent = "";
    if (!drawing || !this.element.isConnected) return;
    const width = this.element.clientWidth;
    if (!width) return;
    this.plot = new uPlot(this.options(drawing, width), data(drawing), this.canvas);
    const over = this.plot.over;
    over.addEventListener("click", () => {
      const at = this.plot?.cursor.idx;
      const step = at === null || at === undefined ? undefined : drawing.steps[at];
      if (step !== undefined) drawing.choose?.(step);
    });
  }

  /** Mark another step. */
  mark(step: number | null): void {
    if (!this.drawing || this.drawing.marked === step) return;
    this.drawing.marked = step;
    this.plot?.redraw(false);
  }

  private fit(): void {
    const width = this.element.clientWidth;
    if (!this.drawing || !width) return;
    if (!this.plot) this.draw(this.drawing);
    else if (this.plot.width !== width) this.plot.setSize({ width, height: this.plot.height });
  }

  private options(drawing: Drawing, width: number): uPlot.Options {
    const format = drawing.format ?? number;
    const axis: uPlot.Axis = {
      stroke: color("muted"),
      grid: { stroke: color("grid"), width: 1 },
      ticks: { stroke: color("grid"), width: 1, size: 4 },
      font: "12px system-ui, sans-serif",
      size: 28,
    };
    const [low = null, high = null] = drawing.range ?? [];
    return {
      width,
      height: drawing.height ?? 180,
      legend: { show: false },
      padding: [12, 28, 0, 0],
      cursor: { y: false, points: { size: 6 }, drag: { x: true, y: false } },
      scales: {
        x: { time: false },
        y: {
          range: (_, from, to) => {
            if (from === null || to === null) return [low ?? 0, high ?? 1];
            const margin = (to - from || Math.abs(to) || 1) * 0.06;
            return [low ?? from - margin, high ?? to + margin];
          },
        },
      },
      axes: [
        { ...axis, values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? number(tick) : "")) },
        { ...axis, size: 56, values: (_, ticks) => ticks.map((tick) => format(tick)) },
      ],
      series: [
        {},
        ...drawing.lines.map((line) => ({
          label: line.label,
          stroke: color(line.color),
          width: line.width ?? WIDTH,
          ...(line.dash ? { dash: line.dash } : {}),
          spanGaps: line.join ?? false,
          points: { show: line.points ?? drawing.steps.length < 3, size: 6, fill: color(line.color) },
        })),
      ],
      bands: (drawing.bands ?? []).map((band) => ({
        series: [band.between[0] + 1, band.between[1] + 1] as [number, number],
        fill: color(band.color),
      })),
      hooks: {
        drawClear: [(plot) => this.drawMarks(plot, drawing)],
        setCursor: [(plot) => this.tell(plot, drawing, format)],
      },
    };
  }

  private drawMarks(plot: uPlot, drawing: Drawing): void {
    const { ctx } = plot;
    const { left, top, width, height } = plot.bbox;
    const vertical = (step: number, stroke: string, dash: number[], thick: number): number => {
      const x = Math.round(plot.valToPos(step, "x", true));
      if (x < left - 1 || x > left + width + 1) return NaN;
      ctx.strokeStyle = stroke;
      ctx.lineWidth = thick * devicePixelRatio;
      ctx.setLineDash(dash.map((length) => length * devicePixelRatio));
      ctx.beginPath();
      ctx.moveTo(x, top);
      ctx.lineTo(x, top + height);
      ctx.stroke();
      return x;
    };
    ctx.save();
    for (const step of drawing.evaluations ?? []) {
      const x = vertical(step, color("evaluation"), [1, 4], 1);
      if (Number.isNaN(x)) continue;
      const size = 5 * devicePixelRatio;
      ctx.fillStyle = color("evaluation");
      ctx.beginPath();
      ctx.moveTo(x, top + size);
      ctx.lineTo(x - size, top - size / 2);
      ctx.lineTo(x + size, top - size / 2);
      ctx.fill();
    }
    if (drawing.marked !== null && drawing.marked !== undefined) vertical(drawing.marked, color("accent"), [], 1.5);
    ctx.restore();
  }

  private tell(plot: uPlot, drawing: Drawing, format: (value: number) => string): void {
    const at = plot.cursor.idx;
    const step = at === null || at === undefined ? undefined : drawing.steps[at];
    const parts = drawing.lines
      .filter((line) => !line.silent)
      .map((line) => [line.label, at === null || at === undefined ? null : line.values[at]] as const)
      .filter((part): part is [string, number] => part[1] !== null && part[1] !== undefined)
      .slice(0, 6)
      .map(([label, value]) => `${label} ${format(value)}`);
    this.values.textContent = step === undefined || !parts.length ? "" : `step ${number(step)}: ${parts.join(" \u00b7 ")}`;
  }
}

function data(drawing: Drawing): uPlot.AlignedData {
  return [drawing.steps, ...drawing.lines.map((line) => line.values)] as uPlot.AlignedData;
}

/** A legend in words; the samples are drawn as the lines are. */
export function legend(lines: { label: string; color: string; dash?: number[]; kind?: "line" | "band" | "mark" }[]): HTMLElement {
  return h(
    "ul",
    { class: "legend" },
    ...lines.map((line) => {
      const kind = line.kind ?? "line";
      const sample = h("span", { class: `sample ${kind}${line.dash ? " dashed" : ""}`, "aria-hidden": "true" });
      sample.style.setProperty("--sample", `var(--${line.color})`);
      return h("li", {}, sample, line.label);
    }),
  );
}
