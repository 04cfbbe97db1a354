// What is selected, and the address that says so.

import { ORDER } from "./table";
import { encode, isReport } from "./source";

export interface Place {
  runs: string[];
  focus: string;
  layer: string;
  step: number | null;
  statistic: string;
  sort: string;
  descending: boolean;
  search: string;
  rule: string;
}

const PREFIX = "p.bnwatch.";
const LONGEST = 2000;

export const place: Place = {
  runs: [],
  focus: "",
  layer: "",
  step: null,
  statistic: "mean_shift",
  sort: ORDER,
  descending: false,
  search: "",
  rule: "",
};

// TensorBoard shows the page in a frame of the same origin, and keeps what stands in its address behind its own
// parameters; a report has an address of its own.
function bar(): Window {
  try {
    if (!isReport() && window.parent !== window && window.parent.location.href) return window.parent;
  } catch {
    // another origin holds the frame
  }
  return window;
}

function pieces(): string[] {
  return bar().location.hash.replace(/^#/, "").split("&").filter(Boolean);
}

function decode(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    return "";
  }
}

/** Take the selection from the address. */
export function readPlace(): void {
  const found = new Map<string, string>();
  for (const piece of pieces()) {
    const [name = "", value = ""] = piece.split("=", 2);
    if (name.startsWith(PREFIX)) found.set(name.slice(PREFIX.length), decode(value));
  }
  const step = Number(found.get("step") ?? NaN);
  const sort = found.get("sort") ?? `+${ORDER}`;
  place.runs = (found.get("runs") ?? "").split("|").map(decode).filter(Boolean);
  place.focus = found.get("focus") ?? "";
  place.layer = found.get("layer") ?? "";
  place.step = Number.isFinite(step) && step >= 0 ? step : null;
  place.statistic = found.get("statistic") ?? "mean_shift";
  place.sort = sort.replace(/^[+-]/, "");
  place.descending = !sort.startsWith("+");
  place.search = found.get("search") ?? "";
  place.rule = found.get("rule") ?? "";
}

/** Write the selection into the address, without a step of the history for each. */
export function writePlace(): void {
  const values: [string, string][] = [
    ["runs", place.runs.map(encode).join("|")],
    ["focus", place.runs.length > 1 ? place.focus : ""],
    ["layer", place.layer],
    ["step", place.step === null ? "" : String(place.step)],
    ["statistic", place.statistic === "mean_shift" ? "" : place.statistic],
    ["sort", place.sort === ORDER && !place.descending ? "" : `${place.descending ? "-" : "+"}${place.sort}`],
    ["search", place.search],
    ["rule", place.rule],
  ];
  const others = pieces().filter((piece) => !piece.startsWith(PREFIX));
  const own = values
    .filter(([, value]) => value && value.length <= LONGEST)
    .map(([name, value]) => `${PREFIX}${name}=${encode(value)}`);
  const home = bar();
  const hash = [...others, ...own].join("&");
  if (`#${hash}` === home.location.hash || (!hash && !home.location.hash)) return;
  try {
    home.history.replaceState(home.history.state, "", `${home.location.pathname}${home.location.search}#${hash}`);
  } catch {
    // a page opened from a place without an address keeps its selection to itself
  }
}

/** Call back when somebody else changes the address: a link, or the history. */
export function watchPlace(changed: () => void): void {
  bar().addEventListener("hashchange", () => {
    if (pieces().some((piece) => piece.startsWith(PREFIX))) changed();
  });
}
