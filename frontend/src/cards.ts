// Diagnoses as cards: one a cause, its consequences folded under it; or that nothing is wrong, and what was looked at.

import { Diagnosis, Run, Table } from "./answers";
import { Child, dataTable, h, icon, say, update } from "./dom";
import { inline } from "./markdown";
import { capital, clean, count, interval, number, shorten } from "./text";

export interface Actions {
  showLayer(layer: string): void;
  showRule(rule: string): void;
}

interface Tree {
  diagnosis: Diagnosis;
  below: Tree[];
}

const WORDS = { error: "Error", warning: "Warning", info: "Info" } as const;
const LONGEST = 1000;
const ROWS = 50;

function key(diagnosis: Diagnosis): string {
  return `${diagnosis.rule} ${diagnosis.subject}`;
}

/** The active diagnoses as trees; each appears once, under the first of its causes that is shown. */
export function headlines(diagnoses: Diagnosis[]): Tree[] {
  const active = new Map(diagnoses.filter((one) => one.state === "active").map((one) => [key(one), one]));
  const causeOf = (one: Diagnosis | undefined): string | undefined => one?.causes.find((cause) => active.has(cause));
  // a record may claim anything, also that something causes itself
  const returns = (one: Diagnosis): boolean => {
    const seen = new Set<string>([key(one)]);
    for (let at = causeOf(one); at !== undefined; at = causeOf(active.get(at))) {
      if (seen.has(at)) return true;
      seen.add(at);
    }
    return false;
  };
  const roots: Diagnosis[] = [];
  const children = new Map<string, Diagnosis[]>();
  for (const one of active.values()) {
    const cause = causeOf(one);
    if (cause === undefined || returns(one)) roots.push(one);
    else children.set(cause, [...(children.get(cause) ?? []), one]);
  }
  const tree = (diagnosis: Diagnosis): Tree => ({ diagnosis, below: (children.get(key(diagnosis)) ?? []).map(tree) });
  return roots.map(tree);
}

/** Everything that is said about a run. */
export function showDiagnoses(home: HTMLElement, run: Run, actions: Actions): void {
  update(home, [run.run, run.report, run.problems, run.layers.length], () => {
    const { report } = run;
    const trees = headlines(report.diagnoses);
    const layers = new Set(run.layers.map((layer) => layer.layer));
    const past = report.diagnoses.filter((one) => one.state !== "active");
    return [
      ...run.problems.map((problem) => notice("warning", "Not everything could be read", shorten(problem, LONGEST))),
      trees.some(({ diagnosis }) => diagnosis.severity !== "info") ? null : calm(run, trees.length > 0),
      ...trees.map((tree, at) => card(run.run, tree, layers, actions, at === 0, 3)),
      folded(run.run, "cleared", past.filter((one) => one.state === "cleared"), layers, actions),
      folded(run.run, "allowed", past.filter((one) => one.state === "allowed"), layers, actions),
      blind(run),
    ];
  });
}

export function notice(kind: string, title: string, ...text: Child[]): HTMLElement {
  return h("div", { class: `notice ${kind}` }, icon(kind), h("div", {}, h("strong", {}, title), h("p", {}, ...text)));
}

function calm(run: Run, informed: boolean): HTMLElement {
  const { report } = run;
  if (!report.samples) {
    return notice(
      "unseen",
      "Nothing has been sampled yet",
      "The first numbers appear within some training steps. If they do not, the watch is not told of any step: see that ",
      "the callback is passed to fit(), or that watch.step() is called in the loop.",
    );
  }
  const seen = [
    count(report.layers, "layer"),
    count(report.sites, "call site"),
    `${count(report.samples, "sample")} in ${count(report.steps, "step")}`,
    count(report.evaluations, "evaluation"),
  ].join(", ");
  const unseen = report.skipped.length
    ? `${count(report.skipped.length, "rule")} could not look; below is why.`
    : "Every rule could look.";
  return notice("fine", informed ? "Nothing is wrong; this is worth knowing" : "Nothing is wrong", `Looked at ${seen}. ${unseen}`);
}

function card(
  run: string,
  tree: Tree,
  layers: Set<string>,
  actions: Actions,
  open: boolean,
  level: number,
): HTMLDetailsElement {
  const one = tree.diagnosis;
  const ownLayer = layers.has(one.subject);
  const severity = one.severity in WORDS ? one.severity : "info";
  const heading = `h${Math.min(level, 6)}` as "h3";
  const details = h(
    "details",
    { class: `card ${severity} ${one.state}`, "data-key": `${run} ${key(one)}`, open },
    h(
      "summary",
      { "data-key": `summary ${run} ${key(one)}` },
      h(
        "span",
        { class: "meta" },
        h("span", { class: "severity" }, icon(severity), WORDS[severity]),
        h("span", { class: "id" }, shorten(one.rule, 20)),
        one.state === "active" ? null : h("span", { class: "tag" }, one.state),
        h("span", { class: "muted" }, steps(one)),
      ),
      h(heading, {}, ...sentence(one.message)),
      tree.below.length
        ? h("span", { class: "muted small" }, `${count(tree.below.length, "consequence")} inside`)
        : null,
    ),
    h(
      "div",
      { class: "inside" },
      ...[...(one.table ? [one.table] : []), ...one.further].map((table) => evidence(table)),
      numbers(one),
      ...one.notes.map((note) => h("p", { class: "note" }, ...inline(shorten(note, LONGEST)))),
      one.helps.length
        ? h("div", { class: "helps" }, h("h4", {}, "What to do"), h("ol", {}, ...one.helps.map(help)))
        : null,
      one.reason ? h("p", {}, h("strong", {}, "Allowed: "), shorten(one.reason, LONGEST)) : null,
      tree.below.length
        ? h(
            "div",
            { class: "below" },
            h("h4", {}, "Follows from it"),
            ...tree.below.map((child) => card(run, child, layers, actions, false, level + 1)),
          )
        : null,
      h(
        "p",
        { class: "actions" },
        ownLayer
          ? button("Show the layer", "layer", `layer ${run} ${key(one)}`, () => actions.showLayer(one.subject))
          : null,
        /^BN\d+$/.test(one.rule)
          ? button(`About ${one.rule}`, "info", `rule ${run} ${key(one)}`, () => actions.showRule(one.rule))
          : null,
        one.state === "active" ? copyButton("Copy the allowance", allowance(one)) : null,
      ),
    ),
  );
  return details;
}

function button(label: string, drawing: string, focus: string, act: () => void): HTMLButtonElement {
  return h("button", { type: "button", class: "quiet", "data-key": focus, onclick: act }, icon(drawing), label);
}

// A message is a fact without a capital; as a heading it begins with one, unless it begins with code.
function sentence(message: string): Child[] {
  return inline(capital(shorten(message, LONGEST)));
}

function steps(one: Diagnosis): string {
  const where = one.subject === "model" ? "" : `${shorten(one.subject, 80)} \u00b7 `;
  return one.first_step === one.last_step
    ? `${where}step ${number(one.first_step)}, epoch ${number(one.epoch + 1)}`
    : `${where}steps ${number(one.first_step)} to ${number(one.last_step)}, since epoch ${number(one.epoch + 1)}`;
}

function evidence(table: Table): HTMLElement {
  const cell = (value: Table["rows"][number][number]): string =>
    typeof value === "string" && !["NaN", "Infinity", "-Infinity"].includes(value) ? shorten(value, 120) : number(value as number);
  const rows = table.rows.slice(0, ROWS).map((row) => row.map(cell));
  const made = dataTable("Evidence", table.columns.map((name) => shorten(name, 60)), rows);
  if (table.rows.length > ROWS) made.append(h("p", { class: "muted small" }, `and ${number(table.rows.length - ROWS)} more`));
  return made;
}

function numbers(one: Diagnosis): HTMLElement | null {
  const entries = Object.entries(one.evidence);
  if (!entries.length) return null;
  return h(
    "dl",
    { class: "facts" },
    ...entries.map(([name, measured]) =>
      h(
        "div",
        {},
        h("dt", {}, shorten(name.replaceAll("_", " "), 80)),
        h(
          "dd",
          {},
          h("strong", {}, number(measured.value)),
          ...(measured.unit ? [" ", ...inline(shorten(measured.unit))] : []),
          measured.interval ? h("span", { class: "muted small" }, ` ${interval(measured.interval)}`) : null,
        ),
      ),
    ),
  );
}

function help(text: string): HTMLElement {
  const code = [...text.matchAll(/`([^`]+)`/g)].map((found) => found[1] ?? "").filter((one) => /[\s(=]/.test(one));
  return h("li", {}, ...inline(shorten(text, LONGEST)), ...code.map((one) => copyButton("Copy", one)));
}

function allowance(one: Diagnosis): string {
  const subject = one.subject.slice(0, 60).replace(/[*?[]/g, "[$&]") + (one.subject.length > 60 ? "*" : "");
  return `allow={${JSON.stringify(clean(one.subject === "model" ? one.rule : `${one.rule}:${subject}`))}: "why"}`;
}

function copyButton(label: string, code: string): HTMLButtonElement {
  const name = h("span", {}, label);
  const made = h(
    "button",
    { type: "button", class: "quiet", title: shorten(code, 200), onclick: () => void copy() },
    icon("copy"),
    name,
  );
  const copy = async (): Promise<void> => {
    let done = true;
    try {
      await navigator.clipboard.writeText(code);
    } catch {
      done = copySelected(code);
    }
    name.textContent = done ? "Copied" : "Could not copy";
    say(done ? "Copied" : "Could not copy");
    setTimeout(() => (name.textContent = label), 2000);
  };
  return made;
}

// where the clipboard is not to be had: a page without https
function copySelected(code: string): boolean {
  const box = h("textarea", { class: "unseen" });
  box.value = code;
  const focused = document.activeElement;
  document.body.append(box);
  box.select();
  const done = document.execCommand("copy");
  box.remove();
  if (focused instanceof HTMLElement) focused.focus();
  return done;
}

function folded(
  run: string,
  state: "cleared" | "allowed",
  past: Diagnosis[],
  layers: Set<string>,
  actions: Actions,
): HTMLElement | null {
  if (!past.length) return null;
  const what = state === "cleared" ? "no longer so" : "allowed by you";
  return h(
    "details",
    { class: "folded", "data-key": `${run} ${state}` },
    h("summary", { "data-key": `summary ${run} ${state}` }, `${count(past.length, "diagnosis", "diagnoses")} ${what}`),
    ...past.map((one) => card(run, { diagnosis: one, below: [] }, layers, actions, false, 3)),
  );
}

function blind(run: Run): HTMLElement | null {
  const { skipped } = run.report;
  if (!skipped.length) return null;
  const reasons = new Map<string, string[]>();
  for (const one of skipped) reasons.set(one.reason, [...(reasons.get(one.reason) ?? []), one.rule]);
  return h(
    "details",
    { class: "folded", "data-key": `${run} blind` },
    h("summary", { "data-key": `summary ${run} blind` }, `${count(skipped.length, "rule")} could not look`),
    h(
      "dl",
      { class: "blind" },
      ...[...reasons].map(([reason, rules]) =>
        h("div", {}, h("dt", {}, ...inline(shorten(reason, LONGEST))), h("dd", { class: "muted" }, rules.map((rule) => shorten(rule, 20)).join(", "))),
      ),
    ),
  );
}
