// Accuracy in training and in evaluation with the gap between them, one colour a run; and what the cells measured.

import { Cell, Cells, drawn, num, Run } from "./answers";
import { Band, Chart, legend, Line } from "./chart";
import { dataTable, h, nothing, update } from "./dom";
import { Figure, thinned } from "./figure";
import { count, number, percent, points, shorten } from "./text";

export interface Shown {
  run: Run;
  letter: string;
  color: string;
}

export class Accuracy {
  private readonly chart = new Chart();
  private readonly legend = h("div");
  private readonly figure = new Figure("accuracy", "Training and evaluation", [], [this.legend, this.chart.element]);
  readonly element = this.figure.element;
  private drawn = "";

  show(shown: Shown[]): void {
    const facts = JSON.stringify(shown.map(({ run, color }) => [run.run, run.version, color]));
    if (facts === this.drawn) return;
    this.drawn = facts;
    const measured = shown.filter(
      ({ run }) => run.evaluations.some((one) => one.accuracy !== null) || run.progress.accuracy.some((one) => drawn(one) !== null),
    );
    if (!measured.length) {
      this.figure.blank(
        nothing(
          "No accuracy is known yet.",
          "It comes with the metrics of fit(), with watch.step(accuracy=\u2026), and with watch.evaluation(accuracy=\u2026).",
        ),
      );
      return;
    }
    const steps = [
      ...new Set(measured.flatMap(({ run }) => [...run.progress.steps, ...run.evaluations.map((one) => one.step)])),
    ].sort((a, b) => a - b);
    const place = new Map(steps.map((step, at) => [step, at]));
    const spread = (pairs: [number, number | null][]): (number | null)[] => {
      const values = new Array<number | null>(steps.length).fill(null);
      for (const [step, value] of pairs) values[place.get(step) ?? 0] = value;
      return values;
    };
    const lines: Line[] = [];
    const bands: Band[] = [];
    const words: Parameters<typeof legend>[0] = [];
    for (const { run, letter, color } of measured) {
      const name = shown.length > 1 ? `${letter}: ` : "";
      const first = lines.length;
      lines.push(
        { label: `${name}training`, color, dash: [5, 4], join: true, values: spread(run.progress.steps.map((step, at) => [step, drawn(run.progress.accuracy[at])])) },
        { label: `${name}evaluation`, color, width: 2.5, points: true, join: true, values: spread(run.evaluations.map((one) => [one.step, drawn(one.accuracy)])) },
        { label: `${name}training over the same epoch`, color: "none", silent: true, width: 0, join: true, values: spread(run.evaluations.map((one) => [one.step, drawn(one.accuracy) === null ? null : drawn(one.train_accuracy)])) },
      );
      // whichever is the upper one
      bands.push({ between: [first + 2, first + 1], color: `${color}-soft` }, { between: [first + 1, first + 2], color: `${color}-soft` });
      words.push({ label: `${name}training`, color, dash: [5, 4] }, { label: `${name}evaluation`, color }, { label: `${name}gap`, color: `${color}-soft`, kind: "band" });
    }
    const chances = new Set(measured.map(({ run }) => drawn(run.chance)).filter((one): one is number => one !== null));
    for (const chance of chances) {
      lines.push({ label: `guessing ${percent(chance)}`, color: "muted", dash: [2, 4], silent: true, join: true, values: steps.map(() => chance) });
      words.push({ label: `guessing, ${percent(chance)}`, color: "muted", dash: [2, 4] });
    }
    this.legend.replaceChildren(legend(words));
    this.figure.show(measured.map((one) => sentence(one, shown.length > 1)).join(" "), () => this.numbers(measured));
    this.chart.draw({ title: "Accuracy", steps, lines, bands, height: 220, format: (value) => percent(value, 0), range: bounds(lines) });
  }

  private numbers(shown: Shown[]): HTMLElement {
    const rows = shown.flatMap(({ run, letter }) =>
      thinned(run.evaluations).map((one) => [
        shown.length > 1 ? `${letter} ${number(one.step)}` : number(one.step),
        percent(one.train_accuracy),
        percent(one.accuracy),
        points(one.gap),
        one.examples ? number(one.examples) : "\u2013",
      ]),
    );
    return dataTable("Evaluations", ["step", "training", "evaluation", "gap in points", "examples"], rows);
  }
}

function bounds(lines: Line[]): [number | null, number | null] {
  const values = lines.flatMap((line) => line.values).filter((one): one is number => one !== null);
  return [Math.max(0, Math.min(...values) - 0.05), Math.min(1.02, Math.max(...values) + 0.05)];
}

function sentence({ run, letter }: Shown, several: boolean): string {
  const lead = several ? `${letter}: ` : "";
  const last = run.evaluations.filter((one) => one.accuracy !== null).at(-1);
  if (!last) return `${lead}Training accuracy only; no evaluation has reported one.`;
  const training = one(last.train_accuracy) ? `, training ${percent(last.train_accuracy)}: a gap of ${points(last.gap)} points` : "";
  return `${lead}The last evaluation, at step ${number(last.step)}, reached ${percent(last.accuracy)}${training}.`;
}

function one(value: Parameters<typeof num>[0]): boolean {
  return !Number.isNaN(num(value));
}

const STATISTICS: [string, string, string][] = [
  ["batch", "batch", "normalized with the statistics of each batch, as in training"],
  ["running", "running", "normalized with the running statistics, as evaluation does"],
  ["population", "re-estimated", "normalized with running statistics re-estimated over many batches"],
  ["reshuffled", "reshuffled", "normalized with batch statistics of the same examples put into batches at random"],
];
const SPLITS: [string, string][] = [["training", "training data"], ["evaluation", "evaluation data"]];

/** The cells of each run: the same examples, evaluated with different statistics. */
export function showCells(home: HTMLElement, shown: Shown[]): void {
  update(home, shown.map(({ run, letter }) => [run.run, run.cells.at(-1), letter]), () => {
    const measured = shown.filter(({ run }) => run.cells.length);
    if (!measured.length) {
      return [
        nothing(
          "Not measured in this run.",
          "The experiment runs by itself when a diagnosis needs it and the watch has examples: give it some with probe=(x, y).",
        ),
      ];
    }
    return measured.flatMap(({ run, letter }) => {
      const cells = run.cells.at(-1) as Cells;
      const columns = STATISTICS.filter(([name]) => SPLITS.some(([split]) => cells.rows[split]?.[name]));
      const splits = SPLITS.filter(([split]) => Object.keys(cells.rows[split] ?? {}).length);
      return [
        h(
          "p",
          { class: "sentence" },
          `${shown.length > 1 ? `${letter}: ` : ""}The same examples with different statistics, at step ${number(cells.step)}. Bars show accuracy from 0 to 100 %, the thin line its 95 % interval.`,
        ),
        h(
          "div",
          { class: "scroll" },
          h(
            "table",
            { class: "data cells" },
            h("caption", { class: "unseen" }, "Accuracy by data and statistics"),
            h("thead", {}, h("tr", {}, h("td", {}), ...columns.map(([, title, help]) => h("th", { scope: "col", title: help }, `${title} statistics`)))),
            h(
              "tbody",
              {},
              ...splits.map(([split, title]) =>
                h("tr", {}, h("th", { scope: "row" }, title), ...columns.map(([name]) => cell(cells.rows[split]?.[name], name))),
              ),
            ),
          ),
        ),
        cells.missing ? h("p", { class: "muted small" }, shorten(cells.missing, 300)) : null,
      ];
    });
  });
}

function cell(one: Cell | undefined, statistics: string): HTMLElement {
  if (!one) return h("td", { class: "muted" }, "\u2013");
  const [low, high] = (one.interval ?? [one.accuracy, one.accuracy]).map(num);
  const bar = h("span", { class: `bar ${statistics}`, "aria-hidden": "true" }, h("i"), h("b"));
  const style = bar.style;
  style.setProperty("--value", String(num(one.accuracy) || 0));
  style.setProperty("--low", String(low || 0));
  style.setProperty("--high", String(high || 0));
  return h(
    "td",
    { title: count(one.examples, "example") },
    h("strong", {}, percent(one.accuracy)),
    bar,
    one.interval ? h("span", { class: "muted small" }, `${percent(one.interval[0])} to ${percent(one.interval[1])}`) : null,
  );
}
