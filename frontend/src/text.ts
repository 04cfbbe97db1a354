// Numbers and words as people read them; what comes from outside is made harmless here.

import { Num, num } from "./answers";

const HIDDEN = /[\p{Cc}\p{Cf}\p{Co}\p{Cn}\p{Cs}\p{Zl}\p{Zp}]/gu;

/** The text with every control, format or unpaired character as a visible escape. */
export function clean(text: string): string {
  return text.replace(HIDDEN, (found) => {
    const code = found.codePointAt(0) ?? 0;
    return code < 0x100 ? `\\x${hex(code, 2)}` : code < 0x10000 ? `\\u${hex(code, 4)}` : `\\u{${hex(code, 1)}}`;
  });
}

function hex(code: number, digits: number): string {
  return code.toString(16).padStart(digits, "0");
}

/** Clean text of bearable length, its middle left out. */
export function shorten(text: string, limit = 160): string {
  const kept = text.length > 4 * limit ? `${text.slice(0, 2 * limit)}${text.slice(-2 * limit)}` : text;
  const cleaned = clean(kept);
  if (cleaned.length <= limit && kept === text) return cleaned;
  const half = Math.floor(limit / 2);
  return `${cleaned.slice(0, half)}\u2026${cleaned.slice(-half)}`;
}

/** A number to three digits, whole numbers in full. */
export function number(value: Num | undefined): string {
  if (value === null || value === undefined) return "\u2013";
  const x = Number(value);
  if (Number.isNaN(x)) return "NaN";
  if (!Number.isFinite(x)) return x > 0 ? "\u221e" : "\u2212\u221e";
  const size = Math.abs(x);
  const text =
    Number.isInteger(x) && size < 1e15 ? x.toLocaleString("en")
    : size >= 1e3 && size < 1e6 ? Math.round(x).toLocaleString("en")
    : size !== 0 && (size < 1e-4 || size >= 1e6) ? x.toExponential(2)
    : String(Number(x.toPrecision(3)));
  return text.replace("-", "\u2212");
}

/** An accuracy in [0, 1] as a percentage. */
export function percent(value: Num | undefined, digits = 1): string {
  const x = num(value);
  return Number.isFinite(x) ? `${(100 * x).toFixed(digits).replace("-", "\u2212")}\u2009%` : number(value);
}

/** A difference of accuracies in points. */
export function points(value: Num | undefined): string {
  const x = num(value);
  return Number.isFinite(x) ? `${x > 0 ? "+" : ""}${(100 * x).toFixed(1).replace("-", "\u2212")}` : number(value);
}

export function interval(ends: [Num, Num] | null | undefined): string {
  return ends ? `95\u2009% interval ${number(ends[0])} to ${number(ends[1])}` : "";
}

/** `1 layer`, `2 layers`. */
export function count(amount: number, what: string, plural = `${what}s`): string {
  return `${amount.toLocaleString("en")} ${amount === 1 ? what : plural}`;
}

/** A layer with its call site where it has several, its replica where there are any. */
export function siteName(layer: string, index: number | null, replica = 0, limit = 160): string {
  return `${shorten(layer, limit)}${index === null ? "" : ` #${index}`}${replica ? ` @${replica}` : ""}`;
}

/** The text with a capital. */
export function capital(text: string): string {
  return text.charAt(0).toUpperCase() + text.slice(1);
}
