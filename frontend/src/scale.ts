// Colours of numbers: lightness alone orders them, so that they read without telling hues apart.

import { isDark } from "./theme";

type Rgb = [number, number, number];

const ONE_WAY: Record<"light" | "dark", Rgb[]> = {
  light: [[242, 245, 248], [250, 216, 170], [232, 140, 60], [168, 64, 16], [84, 24, 8]],
  dark: [[40, 46, 54], [92, 56, 24], [176, 92, 24], [240, 156, 72], [255, 232, 200]],
};
const TWO_WAY: Record<"light" | "dark", Rgb[]> = {
  light: [[8, 48, 108], [66, 132, 190], [242, 245, 248], [232, 140, 60], [127, 39, 4]],
  dark: [[190, 222, 255], [74, 144, 208], [40, 46, 54], [208, 112, 36], [255, 214, 170]],
};
export const NOT_A_NUMBER: Rgb = [190, 60, 180];

export interface Scale {
  /** Colour of a number; of no number, its own. */
  at(value: number): Rgb;
  /** Numbers at equal distances of the legend, from low to high. */
  ticks: number[];
  /** What the middle or the low end is. */
  healthy: number;
}

/** A scale from `low` to `high`; a ratio is symmetric around 1, what changes its sign around 0. */
export function scale(statistic: string, low: number, high: number): Scale {
  const theme = isDark() ? "dark" : "light";
  const ratio = statistic.endsWith("_ratio");
  if (ratio || low < 0) {
    const [into, out] = ratio ? [Math.log, Math.exp] : [(x: number) => x, (x: number) => x];
    const end = Math.max(Math.abs(into(low > 0 || !ratio ? low : 1)), Math.abs(into(high > 0 || !ratio ? high : 1))) || 1;
    return {
      at: (value) => (Number.isNaN(value) ? NOT_A_NUMBER : blend(TWO_WAY[theme], (into(Math.max(value, ratio ? 1e-30 : value)) / end + 1) / 2)),
      ticks: [-1, -0.5, 0, 0.5, 1].map((share) => out(share * end)),
      healthy: ratio ? 1 : 0,
    };
  }
  const width = high - low || 1;
  return {
    at: (value) => (Number.isNaN(value) ? NOT_A_NUMBER : blend(ONE_WAY[theme], (value - low) / width)),
    ticks: [0, 0.25, 0.5, 0.75, 1].map((share) => low + share * width),
    healthy: low,
  };
}

function blend(stops: Rgb[], share: number): Rgb {
  const last = stops.length - 1;
  const place = Math.min(Math.max(share, 0), 1) * last;
  const at = Math.min(Math.floor(place), last - 1);
  const [from = NOT_A_NUMBER, to = NOT_A_NUMBER] = [stops[at], stops[at + 1]];
  return [0, 1, 2].map((part) => Math.round((from[part] ?? 0) + ((to[part] ?? 0) - (from[part] ?? 0)) * (place - at))) as Rgb;
}

export function css([red, green, blue]: Rgb): string {
  return `rgb(${red} ${green} ${blue})`;
}

/** Black or white, whichever reads on it. */
export function ink([red, green, blue]: Rgb): string {
  const linear = (part: number): number => ((part / 255 + 0.055) / 1.055) ** 2.4;
  return 0.2126 * linear(red) + 0.7152 * linear(green) + 0.0722 * linear(blue) > 0.18 ? "#000" : "#fff";
}
