// The whole page: what is asked for when, and where it is shown.

import { Accuracy, showCells, Shown } from "./accuracy";
import { Channels, Heatmap, Layers, num, Run, Runs, Series } from "./answers";
import { showAttribution } from "./attribution";
import { headlines, notice, showDiagnoses } from "./cards";
import { ChannelView } from "./channels";
import { h, nothing, say, speakThrough, update } from "./dom";
import { HeatmapView } from "./heatmap";
import { place, readPlace, watchPlace, writePlace } from "./place";
import { RulePanel } from "./rule";
import { badge, chosen, RunPicker, title } from "./runs";
import { SeriesCharts } from "./series";
import { get, holds, isReport } from "./source";
import { LayerTable } from "./table";
import { count, number, shorten } from "./text";
import { followTheme } from "./theme";

const INTERVAL = 4000;
const PATIENCE = 150;

const START = `from bnwatch.keras import BatchNormWatch
model.fit(x, y, callbacks=[BatchNormWatch("runs/a")])

from bnwatch.chainer import BatchNormWatch
trainer.extend(BatchNormWatch("runs/a"))`;

export class Page {
  private readonly status = h("p", { class: "status muted small" });
  private readonly message = h("div", { class: "messages" });
  private readonly picker = new RunPicker((runs) => this.choose({ runs }), (focus) => this.choose({ focus }));
  private readonly cards = h("div", { class: "runs-cards" });
  private readonly accuracy = new Accuracy();
  private readonly cells = h("div", { class: "figure" });
  private readonly costs = h("div", { class: "figure" });
  private readonly table: LayerTable;
  private readonly layerTitle = h("h2", { tabindex: -1, id: "layer-title" }, "Layer");
  private readonly layerFacts = h("p", { class: "muted" });
  private readonly series = new SeriesCharts((step) => this.choose({ step }));
  private readonly channels = new ChannelView((step) => this.choose({ step }));
  private readonly heatmap = new HeatmapView((statistic) => this.choose({ statistic }), (layer, step) => this.choose({ layer, step }));
  private readonly rule = new RulePanel(() => this.choose({ rule: "" }));
  private readonly slider = h("input", { type: "range", id: "step", min: 0, max: 0, oninput: () => this.slid() });
  private readonly stepText = h("output", { for: "step" });
  private readonly latest = h("button", { type: "button", class: "quiet", onclick: () => this.choose({ step: null }) }, "Latest");
  private readonly body = h("div", { class: "body", hidden: true });
  private readonly waiting = h("p", { class: "muted loading" }, "Loading the runs\u2026");

  private runs: Runs = { runs: [], problems: [], hint: null };
  private readonly held = new Map<string, { version: string; run: Run }>();
  private readonly tables = new Map<string, { key: string; layers: Layers }>();
  /** Of a report: the steps whose tables it holds. */
  private readonly offered = new Map<string, number[]>();
  private readonly asked = new Map<string, string>();
  private known: Set<string> | null = null;
  private heatmapSeen = isReport();
  private busy = false;
  private again = false;
  private slept = false;
  private timer = 0;
  private sliding = 0;

  constructor(private readonly home: HTMLElement) {
    readPlace();
    const sorting = { by: place.sort, descending: place.descending };
    this.table = new LayerTable(
      sorting,
      place.search,
      (layer) => this.choose({ layer }),
      (by, search) => {
        Object.assign(place, { sort: by.by, descending: by.descending, search });
        writePlace();
      },
    );
    this.lay();
    watchPlace(() => {
      readPlace();
      void this.refresh();
    });
  }

  async start(): Promise<void> {
    await this.refresh();
    if (place.rule) void this.rule.open(place.rule);
    if (isReport()) return;
    const wake = (): void => {
      if (this.awake && this.slept) void this.tick();
    };
    document.addEventListener("visibilitychange", wake);
    window.addEventListener("resize", wake);
    this.wait();
  }

  private lay(): void {
    const live = h("div", { class: "unseen", role: "status", "aria-live": "polite" });
    speakThrough(live);
    const section = (key: string, heading: string, ...children: (Node | string)[]): HTMLElement =>
      h("section", { class: key, "aria-labelledby": `${key}-title` }, h("h2", { id: `${key}-title` }, heading), ...children);
    this.body.append(
      h(
        "div",
        { class: "top" },
        section("diagnoses", "Diagnoses", this.cards),
        section(
          "results",
          "Accuracy",
          this.accuracy.element,
          h("h3", {}, "What the statistics cost"),
          this.cells,
          h("h3", {}, "What each layer costs"),
          this.costs,
        ),
      ),
      h(
        "section",
        { class: "layers", "aria-labelledby": "layers-title" },
        h(
          "div",
          { class: "head" },
          h("h2", { id: "layers-title" }, "Layers"),
          h("div", { class: "tools" }, h("label", { for: "step" }, "At step ", this.slider), this.stepText, this.latest),
        ),
        this.table.element,
      ),
      section("over-steps", "Where and when", this.heatmap.element),
      h(
        "section",
        { class: "layer", "aria-labelledby": "layer-title" },
        this.layerTitle,
        this.layerFacts,
        h("div", { class: "pair" }, this.series.element, this.channels.element),
      ),
    );
    this.home.replaceChildren(
      h(
        "header",
        { class: "top-bar" },
        h("h1", {}, "BN Watch"),
        h("nav", { "aria-label": "Runs" }, this.picker.element),
        this.status,
      ),
      this.message,
      this.waiting,
      this.body,
      live,
      this.rule.element,
    );
    new IntersectionObserver(
      (entries) => {
        this.heatmapSeen = isReport() || entries.some((entry) => entry.isIntersecting);
        if (this.heatmapSeen) void this.showHeatmap();
      },
      { rootMargin: "400px" },
    ).observe(this.heatmap.element);
  }

  // Another tab of TensorBoard is shown while the frame has no height.
  private get awake(): boolean {
    return !document.hidden && window.innerHeight > 0;
  }

  private wait(): void {
    clearTimeout(this.timer);
    this.timer = window.setTimeout(() => void this.tick(), INTERVAL);
  }

  private async tick(): Promise<void> {
    this.slept = !this.awake;
    if (!this.slept) await this.refresh();
    this.wait();
  }

  /** Ask for what changed, and show it. */
  private async refresh(): Promise<void> {
    if (this.busy) {
      this.again = true;
      return;
    }
    this.busy = true;
    try {
      do {
        this.again = false;
        await this.load();
      } while (this.again);
      this.complain(null);
    } catch (error) {
      this.complain(error);
    } finally {
      this.busy = false;
      this.waiting.hidden = true;
    }
  }

  private complain(error: unknown): void {
    if (error) this.status.textContent = "Not up to date";
    update(this.message, [error ? String((error as Error).message) : "", this.runs.problems, this.runs.runs.length, this.runs.hint], () => [
      error ? notice("error", "This page cannot go on", shorten(String((error as Error).message), 400)) : null,
      ...this.runs.problems.map((problem) => notice("warning", "Not everything could be read", shorten(problem, 400))),
      !error && !this.runs.runs.length ? this.empty() : null,
    ]);
  }

  private empty(): HTMLElement {
    return h(
      "section",
      { class: "empty", "aria-labelledby": "empty-title" },
      h("h2", { id: "empty-title" }, "There is no record of batch normalization here yet"),
      this.runs.hint ? h("p", {}, shorten(this.runs.hint, 600)) : null,
      h("p", {}, "Watch a training with one line, then come back: this page notices by itself."),
      h("pre", { tabindex: 0 }, h("code", {}, START)),
    );
  }

  private async load(): Promise<void> {
    this.runs = await get<Runs>("runs");
    const names = this.runs.runs.map((run) => run.run);
    place.runs = place.runs.filter((run) => names.includes(run));
    if (!place.runs.length) place.runs = this.gravest();
    if (!place.runs.includes(place.focus)) place.focus = place.runs[0] ?? "";
    this.picker.show(this.runs, place.runs, place.focus);
    this.body.hidden = !place.runs.length;
    if (!place.runs.length) {
      this.status.textContent = "";
      return;
    }
    await Promise.all(place.runs.map((run) => this.loadRun(run)));
    this.showRuns();
    writePlace();
    await this.showDetails();
  }

  private gravest(): string[] {
    const rank = { error: 3, warning: 2, info: 1 };
    const graves = (severity: Runs["runs"][number]["severity"]): number => (severity ? (rank[severity] ?? 0) : 0);
    const first = [...this.runs.runs].sort((a, b) => graves(b.severity) - graves(a.severity))[0];
    return first ? [first.run] : [];
  }

  private async loadRun(run: string): Promise<void> {
    const version = this.runs.runs.find((one) => one.run === run)?.version ?? "";
    if (isReport() && !this.offered.has(run)) this.offered.set(run, (await get<Layers>("layers", { run })).steps);
    const wanted = this.askable("layers", { run }, this.offered.get(run) ?? []);
    const key = `${version} ${wanted === null ? "" : wanted}`;
    const asks: Promise<void>[] = [];
    if (this.held.get(run)?.version !== version) {
      asks.push(get<Run>("run", { run }).then((answer) => void this.held.set(run, { version, run: answer })));
    }
    if (this.tables.get(run)?.key !== key) {
      const params = wanted === null ? { run } : { run, step: wanted };
      asks.push(get<Layers>("layers", params).then((layers) => void this.tables.set(run, { key, layers })));
    }
    await Promise.all(asks);
  }

  // A report holds the answers for some steps: then the nearest of them is asked for, or the latest, which has no step.
  private askable(route: string, params: Record<string, string>, steps: number[]): number | null {
    if (place.step === null || !isReport()) return place.step;
    const last = steps.at(-1);
    const held = steps.filter((step) => step === last || holds(route, { ...params, step }));
    const step = held[nearest(held, place.step)];
    return step === undefined || !holds(route, { ...params, step }) ? null : step;
  }

  private get shown(): Shown[] {
    return chosen(place.runs).flatMap((one) => {
      const run = this.held.get(one.run)?.run;
      return run ? [{ run, letter: one.letter, color: one.color }] : [];
    });
  }

  private get focused(): Run | undefined {
    return this.held.get(place.focus)?.run;
  }

  private showRuns(): void {
    const { shown } = this;
    const several = shown.length > 1;
    this.body.classList.toggle("several", several);
    const homes = new Map([...this.cards.children].map((one) => [(one as HTMLElement).dataset["run"], one as HTMLElement]));
    const wanted = shown.map(({ run, letter, color }) => {
      const home = homes.get(run.run) ?? h("div", { class: "run-cards", "data-run": run.run }, h("div", { class: "run-head" }), h("div", { class: "run-body" }));
      update(home.children[0] as HTMLElement, [several, letter, color], () => (several ? [h("h3", {}, badge({ run: run.run, letter, color }), h("bdi", {}, title(run.run)))] : []));
      showDiagnoses(home.children[1] as HTMLElement, run, { showLayer: (layer) => this.reveal(run.run, layer), showRule: (rule) => this.choose({ rule }) });
      return home;
    });
    if (wanted.length !== this.cards.children.length || wanted.some((home, at) => this.cards.children[at] !== home)) this.cards.replaceChildren(...wanted);
    this.announce(shown);
    this.accuracy.show(shown);
    showCells(this.cells, shown);
    const { focused } = this;
    if (!focused) return;
    showAttribution(this.costs, focused, (layer) => this.reveal(focused.run, layer));
    this.pickLayer(focused);
    this.table.show(
      shown.flatMap(({ run, letter, color }) => {
        const layers = this.tables.get(run.run)?.layers;
        return layers ? [{ letter, color, layers }] : [];
      }),
      focused.statistics,
    );
    this.table.select(place.layer, false);
    this.showStep();
    this.heatmap.statistics(focused.statistics, place.statistic);
    const summary = this.runs.runs.find((one) => one.run === place.focus);
    this.status.textContent = isReport()
      ? `A report of ${count(shown.length, "run")}${summary?.framework ? `, ${shorten(summary.framework, 60)}` : ""}`
      : `${focused.report.complete ? "Finished" : "Following"} \u00b7 step ${number(focused.report.steps)}${summary?.framework ? ` \u00b7 ${shorten(summary.framework, 60)}` : ""}`;
  }

  private announce(shown: Shown[]): void {
    const now = new Set(shown.flatMap(({ run }) => headlines(run.report.diagnoses).map(({ diagnosis }) => `${run.run}: ${diagnosis.message}`)));
    const fresh = [...now].filter((one) => !this.known?.has(one));
    if (fresh.length && this.known) say(`New: ${shorten(fresh.join("; "), 300)}`);
    this.known = now;
  }

  private pickLayer(run: Run): void {
    const names = new Set(run.layers.map((one) => one.layer));
    if (names.has(place.layer)) return;
    const blamed = headlines(run.report.diagnoses).map(({ diagnosis }) => diagnosis.subject).find((subject) => names.has(subject));
    const rows = this.tables.get(run.run)?.layers.rows ?? [];
    const worst = [...rows].sort((a, b) => (num(b.matters) || 0) - (num(a.matters) || 0))[0]?.layer;
    place.layer = blamed ?? worst ?? run.layers[0]?.layer ?? "";
  }

  private get steps(): number[] {
    return this.offered.get(place.focus) ?? this.tables.get(place.focus)?.layers.steps ?? [];
  }

  private showStep(): void {
    const layers = this.tables.get(place.focus)?.layers;
    const steps = this.steps;
    this.slider.max = String(Math.max(0, steps.length - 1));
    this.slider.disabled = steps.length < 2;
    this.latest.hidden = place.step === null;
    if (!this.sliding) {
      const at = layers?.step === null || layers?.step === undefined ? steps.length - 1 : nearest(steps, layers.step);
      this.slider.value = String(at);
    }
    this.describeStep(layers?.step ?? null);
  }

  private describeStep(step: number | null): void {
    this.stepText.textContent = step === null ? "\u2013" : `${number(step)}${place.step === null ? " (latest)" : ""}`;
    this.slider.setAttribute("aria-valuetext", step === null ? "no step" : `step ${number(step)}`);
  }

  private slid(): void {
    const { steps } = this;
    const at = Number(this.slider.value);
    const step = at === steps.length - 1 ? null : (steps[at] ?? null);
    this.describeStep(steps[at] ?? null);
    clearTimeout(this.sliding);
    this.sliding = window.setTimeout(() => {
      this.sliding = 0;
      this.choose({ step });
    }, PATIENCE);
  }

  private choose(change: Partial<typeof place>): void {
    Object.assign(place, change);
    writePlace();
    // what another run has is no news
    if (change.runs) this.known = null;
    if (change.rule) void this.rule.open(change.rule);
    if (change.rule !== undefined) return;
    if (change.layer !== undefined) this.table.select(place.layer, true);
    if (change.step !== undefined) this.series.mark(place.step);
    void this.refresh();
  }

  private reveal(run: string, layer: string): void {
    this.choose({ focus: run, layer });
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.layerTitle.scrollIntoView({ behavior: calm ? "auto" : "smooth", block: "start" });
    this.layerTitle.focus({ preventScroll: true });
  }

  private async showDetails(): Promise<void> {
    const run = this.focused;
    if (!run) return;
    const layer = run.layers.find((one) => one.layer === place.layer);
    update(this.layerTitle, layer?.layer, () => ["Layer ", h("bdi", { class: "path" }, layer ? shorten(layer.layer, 160) : "")]);
    const spec = layer?.spec;
    this.layerFacts.textContent = spec
      ? [
          shorten(spec.kind, 60),
          count(spec.channels, "channel"),
          count(layer.sites, "call site"),
          `decay ${number(spec.decay)}`,
          `epsilon ${number(spec.epsilon)}`,
          spec.trainable ? null : "frozen",
          layer.idle ? "in inference mode during training" : null,
          spec.built_at ? `built at ${shorten(spec.built_at, 100)}` : null,
        ].filter(Boolean).join(" \u00b7 ")
      : "";
    this.heatmap.select(place.layer, place.step);
    const heat = this.heatmapSeen ? this.showHeatmap() : Promise.resolve();
    if (!layer) {
      this.series.failed("No layer has been seen yet.");
      this.channels.failed("No layer has been seen yet.");
      await heat;
      return;
    }
    const version = this.held.get(run.run)?.version ?? "";
    const asked = { run: run.run, layer: layer.layer };
    const step = this.askable("channels", asked, run.channels[layer.layer] ?? []);
    await Promise.all([
      this.ask<Series>("series", asked, version, this.series, (series) => this.series.show(series, place.step)),
      this.ask<Channels>("channels", step === null ? asked : { ...asked, step }, version, this.channels, (channels) => this.channels.show(channels)),
      heat,
    ]);
    this.series.mark(place.step);
  }

  private async showHeatmap(): Promise<void> {
    const run = this.focused;
    if (!run) return;
    const names = run.statistics.map((one) => one.name);
    if (!names.includes(place.statistic)) place.statistic = names.includes("mean_shift") ? "mean_shift" : (names[0] ?? "mean_shift");
    const version = this.held.get(run.run)?.version ?? "";
    this.heatmap.select(place.layer, place.step);
    await this.ask<Heatmap>("heatmap", { run: run.run, statistic: place.statistic }, version, this.heatmap, (map) => {
      this.heatmap.show(map);
      if (map.complete === undefined || map.complete >= 1 || isReport()) return;
      // a long record is folded slice by slice: the picture fills while one looks
      this.asked.delete("heatmap");
      window.setTimeout(() => void this.showHeatmap(), PATIENCE);
    });
  }

  // A picture is asked for once a version and selection, and an answer that comes after a newer question is dropped.
  private async ask<T>(
    route: string,
    params: Record<string, string | number>,
    version: string,
    view: { loading(): void; failed(message: string): void },
    show: (answer: T) => void,
  ): Promise<void> {
    const key = JSON.stringify([params, version]);
    if (this.asked.get(route) === key) return;
    this.asked.set(route, key);
    view.loading();
    try {
      const answer = await get<T>(route, params);
      if (this.asked.get(route) === key) show(answer);
    } catch (error) {
      if (this.asked.get(route) !== key) return;
      view.failed(String((error as Error).message));
      // asked again with the next round: TensorBoard may be back by then
      if (!isReport()) this.asked.delete(route);
    }
  }
}

function nearest(steps: number[], step: number): number {
  let found = 0;
  steps.forEach((one, at) => {
    if (Math.abs(one - step) < Math.abs((steps[found] ?? Infinity) - step)) found = at;
  });
  return found;
}

/** Show the page where the document has a place for it, or in the whole document. */
export async function start(styles: string[]): Promise<void> {
  document.head.append(h("style", {}, styles.join("\n")));
  if (!document.documentElement.lang) document.documentElement.lang = "en";
  if (!document.title) document.title = "BN Watch";
  followTheme();
  const given = document.getElementById("bnwatch");
  const home = given ?? h("main", { id: "bnwatch" });
  if (!given) document.body.append(home);
  if (!("ResizeObserver" in window)) {
    home.append(nothing("This browser is too old for BN Watch.", "Open the page in a current one."));
    return;
  }
  await new Page(home).start();
}
