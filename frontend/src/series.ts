// Batch against running statistics of one layer over steps: a line a call site, the noise band, evaluations marked.

import { drawn, num, Series, SiteSeries } from "./answers";
import { Band, Chart, legend, Line } from "./chart";
import { dataTable, h, nothing } from "./dom";
import { Figure, thinned } from "./figure";
import { count, number } from "./text";

const SITES = 6;

export class SeriesCharts {
  private readonly charts = { mean: new Chart(), std: new Chart(), shift: new Chart() };
  private readonly legend = h("div");
  private readonly sites = h("div", { class: "tools" });
  private readonly figure = new Figure("series", "Batch against running statistics", [], [
    this.sites,
    this.legend,
    h("h4", {}, "Mean, averaged over channels"),
    this.charts.mean.element,
    h("h4", {}, "Standard deviation, averaged over channels"),
    this.charts.std.element,
    h("h4", {}, "Distance of the means, in running standard deviations"),
    this.charts.shift.element,
  ]);
  readonly element = this.figure.element;
  private series: Series | null = null;
  private marked: number | null = null;
  private hidden = new Set<number>();

  constructor(private readonly choose: (step: number) => void) {}

  loading(): void {
    this.figure.loading();
  }

  failed(message: string): void {
    this.series = null;
    this.figure.blank(nothing("These lines cannot be shown.", message));
  }

  show(series: Series, step: number | null): void {
    if (series.layer !== this.series?.layer) this.hidden = new Set(series.sites.map((_, at) => at).filter((at) => at >= SITES));
    this.series = series;
    this.marked = step;
    if (!series.steps.length || !series.sites.length) {
      this.figure.blank(nothing("This layer has not been seen in training mode yet.", "It appears after its first sampled training step."));
      return;
    }
    this.figure.show(sentence(series), () => numbers(series));
    this.pickSites(series);
    this.draw();
  }

  mark(step: number | null): void {
    this.marked = step;
    for (const chart of Object.values(this.charts)) chart.mark(step);
  }

  private pickSites(series: Series): void {
    this.sites.replaceChildren(
      ...(series.sites.length < 2
        ? []
        : series.sites.map((site, at) => {
            const box = h("input", {
              type: "checkbox",
              checked: !this.hidden.has(at),
              onchange: () => {
                if (box.checked) this.hidden.delete(at);
                else this.hidden.add(at);
                this.draw();
              },
            });
            return h("label", { class: "check" }, box, siteTitle(site));
          })),
    );
  }

  private draw(): void {
    const { series } = this;
    if (!series) return;
    const shown = series.sites.map((site, at) => ({ site, at })).filter(({ at }) => !this.hidden.has(at));
    const several = series.sites.length > 1;
    const common = { steps: series.steps, evaluations: series.evaluations, marked: this.marked, choose: this.choose };
    const pairs = (batch: "batch_mean" | "batch_std", running: "running_mean" | "running_std", band: boolean): { lines: Line[]; bands: Band[] } => {
      const lines: Line[] = [];
      const bands: Band[] = [];
      for (const { site, at } of shown) {
        const name = several ? `${siteTitle(site)} ` : "";
        const color = `site-${at % SITES}`;
        if (band) {
          const half = site.mean_noise.map((noise, place) => num(noise) * num(site.running_std[place]));
          const edge = (sign: number): (number | null)[] => half.map((width, place) => drawn(num(site[running][place]) + sign * width));
          bands.push({ between: [lines.length, lines.length + 1], color: `${color}-soft` });
          lines.push({ label: "", color: "none", width: 0, silent: true, values: edge(1) }, { label: "", color: "none", width: 0, silent: true, values: edge(-1) });
        }
        lines.push(
          { label: `${name}batch`, color, width: 1.25, values: site[batch].map(drawn) },
          { label: `${name}running`, color, width: 2.5, dash: [7, 4], values: site[running].map(drawn) },
        );
      }
      return { lines, bands };
    };
    const distance: Line[] = shown.map(({ site, at }) => ({ label: several ? siteTitle(site) : "distance", color: `site-${at % SITES}`, values: site.mean_shift.map(drawn) }));
    const noise = shown[0]?.site.mean_noise.map(drawn) ?? [];
    const zero = noise.map((one) => (one === null ? null : 0));
    const bands: Band[] = [{ between: [distance.length, distance.length + 1], color: "noise" }];
    distance.push({ label: "noise", color: "muted", width: 1, dash: [2, 3], values: noise }, { label: "", color: "none", width: 0, silent: true, values: zero });
    this.legend.replaceChildren(
      legend([
        ...shown.flatMap(({ site, at }) => {
          const name = several ? `${siteTitle(site)}, ` : "";
          const color = `site-${at % SITES}`;
          return [{ label: `${name}batch`, color }, { label: `${name}running`, color, dash: [7, 4] }];
        }),
        { label: "noise: as far apart as chance puts them", color: "noise", kind: "band" as const },
        ...(series.evaluations.length ? [{ label: "evaluation", color: "evaluation", kind: "mark" as const }] : []),
      ]),
    );
    this.charts.mean.draw({ ...common, title: "Mean", ...pairs("batch_mean", "running_mean", true) });
    this.charts.std.draw({ ...common, title: "Standard deviation", ...pairs("batch_std", "running_std", false), height: 140 });
    this.charts.shift.draw({ ...common, title: "Distance", lines: distance, bands, height: 140, range: [0, null] });
  }
}

function siteTitle(site: SiteSeries): string {
  return `call ${site.index + 1}${site.replica ? ` on replica ${site.replica + 1}` : ""}`;
}

function sentence(series: Series): string {
  const parts = series.sites.slice(0, SITES).map((site) => {
    const [shift, noise] = [num(site.mean_shift.at(-1)), num(site.mean_noise.at(-1))];
    const judged = Number.isFinite(shift) && Number.isFinite(noise) ? (shift > noise ? ", more than noise explains" : ", within noise") : "";
    return `${series.sites.length > 1 ? `${siteTitle(site)}: ` : ""}the batch mean lies ${number(site.mean_shift.at(-1))} running standard deviations from the running mean${judged}`;
  });
  const last = series.steps.at(-1);
  const text = `At step ${number(last)}, ${parts.join("; ")}.`;
  return series.samples > series.steps.length ? `${text} ${number(series.steps.length)} of ${count(series.samples, "sample")} are drawn, the extremes among them.` : text;
}

function numbers(series: Series): HTMLElement {
  const columns = ["batch_mean", "running_mean", "batch_std", "running_std", "mean_shift", "mean_noise"] as const;
  const places = thinned(series.steps.map((_, at) => at));
  const rows = places.flatMap((at) =>
    series.sites.map((site) => [
      number(series.steps[at]),
      ...(series.sites.length > 1 ? [siteTitle(site)] : []),
      ...columns.map((name) => number(site[name][at])),
    ]),
  );
  const heads = ["step", ...(series.sites.length > 1 ? ["call"] : []), ...columns.map((name) => name.replace("_", " "))];
  return dataTable("Batch and running statistics", heads, rows);
}
