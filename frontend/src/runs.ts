// Which runs are shown: several are compared, a letter and a colour each.

import { Runs, RunSummary } from "./answers";
import { h, icon, update } from "./dom";
import { count, number, shorten } from "./text";

export const COLORS = 6;
const SEVERITY = { error: "error", warning: "warning", info: "info" } as const;

export interface Chosen {
  run: string;
  letter: string;
  color: string;
}

/** The letter and colour of each chosen run. */
export function chosen(runs: string[]): Chosen[] {
  return runs.map((run, at) => ({ run, letter: String.fromCharCode(65 + (at % 26)), color: `run-${at % COLORS}` }));
}

export class RunPicker {
  private readonly list = h("div", { class: "run-list" });
  private readonly chips = h("div", { class: "chips" });
  private readonly filter = h("input", { type: "search", "aria-label": "Search runs", placeholder: "Search runs", oninput: () => this.narrow() });
  private readonly open = h("summary", {}, "Runs");
  private readonly panel: HTMLDetailsElement = h("details", { class: "picker" }, this.open, h("div", { class: "panel" }, this.filter, this.list));
  readonly element = h("div", { class: "runs" }, this.panel, this.chips);

  constructor(
    private readonly set: (runs: string[]) => void,
    private readonly focus: (run: string) => void,
  ) {
    this.panel.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      this.panel.open = false;
      this.open.focus();
    });
    document.addEventListener("click", (event) => {
      if (!event.composedPath().includes(this.panel)) this.panel.open = false;
    });
  }

  show(runs: Runs, selected: string[], focused: string): void {
    this.open.textContent = selected.length > 1 ? `${selected.length} of ${count(runs.runs.length, "run")}` : count(runs.runs.length, "run");
    this.filter.hidden = runs.runs.length < 8;
    update(this.list, [runs.runs, selected], () =>
      runs.runs.map((run) => {
        const mark = chosen(selected).find((one) => one.run === run.run);
        const box = h("input", {
          type: "checkbox",
          checked: !!mark,
          "data-key": `run ${run.run}`,
          onchange: () => {
            const next = box.checked ? [...selected, run.run] : selected.filter((one) => one !== run.run);
            if (next.length) this.set(next);
            else box.checked = true;
          },
        });
        const only = h("button", { type: "button", class: "quiet", "data-key": `only ${run.run}`, onclick: () => this.set([run.run]) }, "Only this");
        return h(
          "div",
          { class: "run", "data-run": run.run.toLowerCase() },
          h("label", {}, box, badge(mark), h("span", { class: "run-name" }, h("bdi", {}, title(run.run)), h("span", { class: "muted small" }, facts(run)))),
          only,
        );
      }),
    );
    update(this.chips, [selected, focused], () =>
      selected.length < 2
        ? [h("strong", { class: "one-run" }, h("bdi", {}, title(selected[0] ?? "")))]
        : chosen(selected).map((one) =>
            h(
              "button",
              {
                type: "button",
                class: "chip",
                "aria-pressed": one.run === focused ? "true" : "false",
                "data-key": `chip ${one.run}`,
                title: "Show the layers of this run below",
                onclick: () => this.focus(one.run),
              },
              badge(one),
              h("bdi", {}, title(one.run)),
            ),
          ),
    );
    this.narrow();
  }

  private narrow(): void {
    const wanted = this.filter.value.trim().toLowerCase();
    for (const one of this.list.children) (one as HTMLElement).hidden = !((one as HTMLElement).dataset["run"] ?? "").includes(wanted);
  }
}

/** The letter of a compared run on its colour. */
export function badge(one: Chosen | undefined): HTMLElement {
  const made = h("span", { class: "badge" }, one?.letter ?? "");
  if (one) made.style.setProperty("--own", `var(--${one.color})`);
  else made.classList.add("none");
  return made;
}

/** A run's name; the top directory has none. */
export function title(run: string): string {
  return run === "." ? "this directory" : shorten(run, 80);
}

function facts(run: RunSummary): HTMLElement {
  const state = run.complete ? "finished" : "running, or cut off";
  const text = ` ${count(run.layers, "layer")}, ${number(run.steps)} steps, ${state}`;
  const severity = run.severity && run.severity in SEVERITY ? run.severity : null;
  return h("span", { class: `run-facts ${severity ?? ""}` }, severity ? icon(severity) : null, severity ? `${severity} \u00b7` : null, text);
}
