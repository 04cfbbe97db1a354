// What the routes answer. Numbers that JSON lacks come as text; null is unknown.

export type Num = number | "NaN" | "Infinity" | "-Infinity" | null;
export type Severity = "error" | "warning" | "info";

export interface RunSummary {
  run: string;
  framework: string | null;
  complete: boolean;
  steps: number;
  epochs: number | null;
  samples: number;
  layers: number;
  sites: number;
  evaluations: number;
  severity: Severity | null;
  headline: string | null;
  version: string;
}

export interface Runs {
  runs: RunSummary[];
  problems: string[];
  hint: string | null;
}

export interface Quantity {
  value: Num;
  unit: string;
  interval: [Num, Num] | null;
}

export interface Table {
  columns: string[];
  rows: (string | Num)[][];
}

export interface Diagnosis {
  rule: string;
  name: string;
  severity: Severity;
  state: "active" | "cleared" | "allowed";
  subject: string;
  first_step: number;
  last_step: number;
  epoch: number;
  message: string;
  evidence: Record<string, Quantity>;
  table: Table | null;
  further: Table[];
  notes: string[];
  helps: string[];
  causes: string[];
  consequences: string[];
  reason: string | null;
}

export interface Skipped {
  rule: string;
  reason: string;
  needs: string | null;
}

export interface Report {
  complete: boolean;
  layers: number;
  sites: number;
  samples: number;
  steps: number;
  evaluations: number;
  diagnoses: Diagnosis[];
  skipped: Skipped[];
}

export interface Evaluation {
  step: number;
  epoch: number;
  accuracy: Num;
  loss: Num;
  examples: number;
  train_accuracy: Num;
  gap: Num;
}

export interface Cell {
  accuracy: Num;
  examples: number;
  interval?: [Num, Num] | null;
}

export interface Cells {
  step: number;
  epoch: number;
  missing: string | null;
  rows: Record<string, Record<string, Cell>>;
}

export interface Difference {
  gained: Num;
  interval: [Num, Num];
  p_value: Num;
}

export interface Attribution {
  step: number;
  epoch: number;
  split: string;
  examples: number;
  running: Num;
  batch: Num;
  cost: Difference;
  costs: { layer: string; index: number | null; distance: Num; recovered: Difference; lost: Difference }[];
  unmeasured: string[];
}

export interface Spec {
  path: string;
  kind: string;
  channels: number;
  epsilon: number;
  decay: number;
  trainable: boolean;
  built_at: string | null;
}

export interface Layer {
  layer: string;
  spec: Spec | null;
  sites: number;
  idle: boolean;
  diagnoses: string[];
}

export interface Statistic {
  name: string;
  title: string;
  unit: string;
  help: string;
}

export interface Run {
  run: string;
  version: string;
  report: Report;
  problems: string[];
  progress: { steps: number[]; epoch: Num[]; accuracy: Num[]; loss: Num[] };
  evaluations: Evaluation[];
  chance: Num;
  cells: Cells[];
  attribution: Attribution | null;
  layers: Layer[];
  statistics: Statistic[];
  samples: { count: number; first: number | null; last: number | null };
  channels: Record<string, number[]>;
}

export interface Site {
  index: number;
  replica: number;
}

export interface LayerRow extends Site {
  layer: string;
  matters: Num;
  why: string;
  values: Num[];
}

export interface Layers {
  step: number | null;
  epoch: number | null;
  statistics: string[];
  rows: LayerRow[];
  steps: number[];
}

export interface SiteSeries extends Site {
  batch_mean: Num[];
  running_mean: Num[];
  batch_std: Num[];
  running_std: Num[];
  mean_shift: Num[];
  std_ratio: Num[];
  mean_noise: Num[];
  updates: Num[];
}

export interface Series {
  layer: string;
  steps: number[];
  sites: SiteSeries[];
  evaluations: number[];
  samples: number;
}

export interface Heatmap {
  statistic: string;
  steps: number[];
  sites: [string, number, number][];
  values: Num[][];
  low: Num;
  high: Num;
  /** Share of the samples that is in it so far. */
  complete?: number;
}

export interface SiteChannels extends Site {
  batch_mean: Num[];
  batch_std: Num[];
  running_mean: Num[];
  running_std: Num[];
  mean_shift: Num[];
  std_ratio: Num[];
}

export interface Channels {
  layer: string;
  step: number | null;
  steps: number[];
  channels: number[];
  of: number;
  sites: SiteChannels[];
  missing: string | null;
}

export interface Rule {
  rule: string;
  name: string;
  severity: Severity;
  summary: string;
  markdown: string;
}

/** The number; NaN where it is unknown or no number. */
export function num(value: Num | undefined): number {
  return value === null || value === undefined ? NaN : Number(value);
}

/** The number for a chart: null where there is nothing to draw. */
export function drawn(value: Num | undefined): number | null {
  const number = num(value);
  return Number.isFinite(number) ? number : null;
}
