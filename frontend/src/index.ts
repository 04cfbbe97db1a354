import plotStyles from "uplot/dist/uPlot.min.css";
import { start } from "./app";
import ownStyles from "./style.css";

let started = false;

/** Show the page; TensorBoard calls it, and so does the report. */
export function render(): void {
  if (started) return;
  started = true;
  void start([plotStyles, ownStyles]);
}
