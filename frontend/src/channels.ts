// The channels of one layer at one step: how their shifts are spread, and every channel as a strip.

import { Channels, num, Num, SiteChannels } from "./answers";
import { dataTable, h, nothing } from "./dom";
import { Figure } from "./figure";
import { css, NOT_A_NUMBER, scale } from "./scale";
import { count, number } from "./text";
import { color, onTheme } from "./theme";

const BINS = 31;
const STRIPS: { key: "mean_shift" | "std_ratio"; title: string; word: string }[] = [
  { key: "mean_shift", title: "Distance of the means, in running standard deviations", word: "shift" },
  { key: "std_ratio", title: "Batch / running standard deviation", word: "ratio" },
];

export class ChannelView {
  private readonly slider = h("input", { type: "range", id: "channel-step", min: 0, max: 0, oninput: () => this.slid() });
  private readonly at = h("output", { for: "channel-step" });
  private readonly kind = h("select", { id: "channel-statistic", onchange: () => this.draw() }, ...STRIPS.map(({ key, title }) => h("option", { value: key }, title)));
  private readonly histogram = h("canvas", { height: 160, role: "img" });
  private readonly strip = h("canvas", { height: 40, tabindex: 0, role: "application", "aria-roledescription": "strip of channels" });
  private readonly readout = h("p", { class: "under-cursor", role: "status" });
  private readonly figure = new Figure(
    "channels",
    "Channels",
    [h("label", { for: "channel-statistic" }, "Show ", this.kind), h("label", { for: "channel-step" }, "At step ", this.slider), this.at],
    [h("h4", {}, "How many channels lie where"), this.histogram, h("h4", {}, "Each channel, first to last"), this.strip, this.readout],
  );
  readonly element = this.figure.element;
  private channels: Channels | null = null;
  private cursor = 0;
  private timer = 0;

  constructor(private readonly choose: (step: number) => void) {
    new ResizeObserver(() => this.draw()).observe(this.element);
    onTheme(() => this.draw());
    this.strip.addEventListener("mousemove", (event) => this.point(event.offsetX / this.strip.clientWidth));
    this.strip.addEventListener("focus", () => this.tell());
    this.strip.addEventListener("keydown", (event) => {
      const last = (this.channels?.channels.length ?? 1) - 1;
      const to = { ArrowRight: this.cursor + 1, ArrowLeft: this.cursor - 1, Home: 0, End: last, PageDown: this.cursor + 10, PageUp: this.cursor - 10 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      this.cursor = Math.min(Math.max(to, 0), last);
      this.tell();
    });
  }

  loading(): void {
    this.figure.loading();
  }

  failed(message: string): void {
    this.channels = null;
    this.figure.blank(nothing("These channels cannot be shown.", message));
  }

  show(channels: Channels): void {
    this.channels = channels;
    const { steps, step } = channels;
    this.slider.max = String(Math.max(0, steps.length - 1));
    this.slider.disabled = steps.length < 2;
    const at = step === null ? -1 : steps.indexOf(step);
    if (document.activeElement !== this.slider || !this.timer) this.slider.value = String(at < 0 ? steps.length - 1 : at);
    this.describeStep();
    this.figure.tools.hidden = !steps.length;
    if (channels.missing !== null || !channels.sites.length) {
      this.figure.blank(nothing("No single channels of this layer are in the record.", channels.missing ?? "They are written for the layers that are farthest off."));
      return;
    }
    this.cursor = Math.min(this.cursor, channels.channels.length - 1);
    this.figure.show(this.sentence(channels), () => this.numbers(channels));
    this.draw();
  }

  private slid(): void {
    this.describeStep();
    clearTimeout(this.timer);
    this.timer = window.setTimeout(() => {
      this.timer = 0;
      const step = this.channels?.steps[Number(this.slider.value)];
      if (step !== undefined) this.choose(step);
    }, 120);
  }

  private describeStep(): void {
    const step = this.channels?.steps[Number(this.slider.value)];
    this.at.textContent = step === undefined ? "\u2013" : number(step);
    this.slider.setAttribute("aria-valuetext", step === undefined ? "no step" : `step ${number(step)}`);
  }

  private get chosen(): (typeof STRIPS)[number] {
    return STRIPS.find(({ key }) => key === this.kind.value) ?? (STRIPS[0] as (typeof STRIPS)[number]);
  }

  private values(site: SiteChannels): number[] {
    return (site[this.chosen.key] as Num[]).map(num);
  }

  private draw(): void {
    const { channels } = this;
    if (!channels || channels.missing !== null || !channels.sites.length || !this.histogram.clientWidth) return;
    const all = channels.sites.map((site) => this.values(site));
    this.drawHistogram(all);
    this.drawStrip(all);
    this.strip.setAttribute("aria-label", `${this.chosen.title} of ${count(channels.channels.length, "channel")}; move with the arrow keys`);
  }

  private drawHistogram(all: number[][]): void {
    const finite = all.flat().filter(Number.isFinite);
    const ratio = this.chosen.key === "std_ratio";
    let [low, high] = [Math.min(ratio ? 0.5 : -1, ...finite), Math.max(ratio ? 2 : 1, ...finite)];
    if (!ratio) [low, high] = [-Math.max(-low, high), Math.max(-low, high)];
    const width = (high - low) / BINS;
    const bins = all.map((values) => {
      const filled = new Array<number>(BINS).fill(0);
      for (const value of values) if (Number.isFinite(value)) filled[Math.min(BINS - 1, Math.floor((value - low) / width))]! += 1;
      return filled;
    });
    const most = Math.max(1, ...bins.flat());
    const { context, wide, high: tall } = prepare(this.histogram, 160);
    const [left, bottom] = [36, 22];
    const x = (value: number): number => left + ((value - low) / (high - low)) * (wide - left - 8);
    const y = (value: number): number => tall - bottom - (value / most) * (tall - bottom - 10);
    context.font = "12px system-ui, sans-serif";
    context.fillStyle = color("muted");
    context.strokeStyle = color("grid");
    for (const share of [0, 0.5, 1]) {
      const level = Math.round(share * most);
      context.textAlign = "right";
      context.fillText(number(level), left - 6, y(level) + 4);
      context.beginPath();
      context.moveTo(left, y(level) + 0.5);
      context.lineTo(wide - 8, y(level) + 0.5);
      context.stroke();
    }
    context.textAlign = "center";
    for (const value of ratio ? [low, 1, high] : [low, low / 2, 0, high / 2, high]) context.fillText(number(Number(value.toPrecision(2))), Math.min(Math.max(x(value), left + 12), wide - 20), tall - 6);
    const room = (x(low + width) - x(low) - 1) / bins.length;
    bins.forEach((filled, site) => {
      context.fillStyle = color(`site-${site % 6}`);
      filled.forEach((amount, bin) => {
        if (amount) context.fillRect(x(low + bin * width) + site * room, y(amount), Math.max(1, room), y(0) - y(amount));
      });
    });
    const middle = x(ratio ? 1 : 0);
    context.strokeStyle = color("text");
    context.setLineDash([3, 3]);
    context.beginPath();
    context.moveTo(middle, 4);
    context.lineTo(middle, tall - bottom);
    context.stroke();
    context.setLineDash([]);
    const far = finite.filter((value) => (ratio ? Math.abs(Math.log(value)) > Math.log(2) : Math.abs(value) > 1)).length;
    this.histogram.setAttribute(
      "aria-label",
      `Histogram of the ${this.chosen.word} of ${count(finite.length, "channel")}, from ${number(Math.min(...finite))} to ${number(Math.max(...finite))}; ` +
        `${number(far)} ${ratio ? "differ by more than a factor of 2" : "lie more than one standard deviation away"}`,
    );
  }

  private drawStrip(all: number[][]): void {
    const row = 22;
    const finite = all.flat().filter(Number.isFinite);
    const ratio = this.chosen.key === "std_ratio";
    const end = Math.max(1, ...finite.map(Math.abs));
    const colors = ratio ? scale("std_ratio", Math.min(0.5, ...finite), Math.max(2, ...finite)) : scale("mean_shift", -end, end);
    const { context, wide } = prepare(this.strip, row * all.length);
    const most = Math.max(1, all[0]?.length ?? 1);
    all.forEach((values, site) => {
      values.forEach((value, channel) => {
        context.fillStyle = css(Number.isFinite(value) ? colors.at(value) : NOT_A_NUMBER);
        context.fillRect((channel / most) * wide, site * row, Math.ceil(wide / most), row - 2);
      });
    });
  }

  private point(share: number): void {
    const most = this.channels?.channels.length ?? 0;
    if (!most) return;
    this.cursor = Math.min(most - 1, Math.max(0, Math.floor(share * most)));
    this.tell();
  }

  private tell(): void {
    const { channels } = this;
    const channel = channels?.channels[this.cursor];
    if (!channels || channel === undefined) return;
    const parts = channels.sites.map((site) => {
      const lead = channels.sites.length > 1 ? `call ${site.index + 1}: ` : "";
      return (
        `${lead}batch ${number(site.batch_mean[this.cursor])} \u00b1 ${number(site.batch_std[this.cursor])}, ` +
        `running ${number(site.running_mean[this.cursor])} \u00b1 ${number(site.running_std[this.cursor])}`
      );
    });
    this.readout.textContent = `Channel ${number(channel)}: ${parts.join("; ")}`;
  }

  private sentence(channels: Channels): string {
    const kept = channels.channels.length < channels.of ? `${number(channels.channels.length)} of ${count(channels.of, "channel")}` : count(channels.of, "channel");
    const worst = channels.sites
      .flatMap((site) => site.mean_shift.map((shift, at) => ({ size: Math.abs(num(shift)), shift, at })))
      .filter((one) => Number.isFinite(one.size))
      .sort((a, b) => b.size - a.size)[0];
    const far = worst ? ` Farthest off is channel ${number(channels.channels[worst.at])}, its batch mean ${number(worst.shift)} running standard deviations from the running mean.` : "";
    return `${kept} at step ${number(channels.step)}.${far}`;
  }

  private numbers(channels: Channels): HTMLElement {
    const columns = ["batch_mean", "batch_std", "running_mean", "running_std", "mean_shift", "std_ratio"] as const;
    const several = channels.sites.length > 1;
    return dataTable(
      "Channels",
      ["channel", ...(several ? ["call"] : []), ...columns.map((name) => name.replace("_", " "))],
      channels.channels.slice(0, 512).flatMap((channel, at) =>
        channels.sites.map((site) => [number(channel), ...(several ? [String(site.index + 1)] : []), ...columns.map((name) => number(site[name][at]))]),
      ),
    );
  }
}

/** A canvas as wide as its place, in the pixels of the screen. */
export function prepare(canvas: HTMLCanvasElement, high: number): { context: CanvasRenderingContext2D; wide: number; high: number } {
  const wide = canvas.clientWidth;
  canvas.width = Math.round(wide * devicePixelRatio);
  canvas.height = Math.round(high * devicePixelRatio);
  canvas.style.height = `${high}px`;
  const context = canvas.getContext("2d") as CanvasRenderingContext2D;
  context.scale(devicePixelRatio, devicePixelRatio);
  return { context, wide, high };
}
