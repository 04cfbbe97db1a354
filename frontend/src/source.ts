// Where answers come from: the routes of the plugin, or what is embedded in a report.

/** Nothing can be had; the message says what to do. */
export class SourceError extends Error {}

type Params = Record<string, string | number>;

const EMBEDDED = "bnwatch-answers";

let embedded: Record<string, unknown> | null | undefined;

function answers(): Record<string, unknown> | null {
  if (embedded === undefined) {
    const text = document.getElementById(EMBEDDED)?.textContent;
    embedded = text ? (JSON.parse(text) as Record<string, unknown>) : null;
  }
  return embedded;
}

/** Whether the page is a report that nothing can be added to. */
export function isReport(): boolean {
  return answers() !== null;
}

function address(route: string, params: Params): string {
  const pairs = Object.keys(params)
    .sort()
    .map((name) => `${encode(name)}=${encode(String(params[name]))}`);
  return pairs.length ? `${route}?${pairs.join("&")}` : route;
}

/** Text as an address holds it; a surrogate without its partner cannot stand there. */
export function encode(text: string): string {
  return encodeURIComponent(
    text.replace(/[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g, "\ufffd"),
  );
}

/** Whether an answer can be had: of a report only what is in it. */
export function holds(route: string, params: Params): boolean {
  const held = answers();
  return held === null || address(route, params) in held;
}

/** The answer of a route. */
export async function get<T>(route: string, params: Params = {}): Promise<T> {
  const key = address(route, params);
  const held = answers();
  if (held) {
    if (key in held) return held[key] as T;
    throw new SourceError(
      "This report holds a selection only, and this is not part of it. Open the run in TensorBoard to see everything.",
    );
  }
  let response: Response;
  try {
    response = await fetch(`./${key}`, { cache: "no-store" });
  } catch {
    throw new SourceError("TensorBoard does not answer. Is it still running? This page goes on as soon as it does.");
  }
  const body = (await response.json().catch(() => null)) as { error?: unknown } | null;
  if (response.ok && body !== null) return body as T;
  const said = body && typeof body.error === "string" ? body.error : `TensorBoard answered ${response.status}`;
  throw new SourceError(`${said}.`.replace(/\.\.$/, "."));
}
