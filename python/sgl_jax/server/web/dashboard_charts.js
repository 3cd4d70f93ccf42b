// Charts of the dashboard, drawn by uPlot, and how their numbers are written.
import { html, Component } from "./vendor/preact-htm.js";

const SHORTEST_S = 60; // of time that a chart shows
const time = (seconds) => new Date(1000 * seconds).toLocaleTimeString("en", { hour12: false });
const digits = (n, most) => n.toLocaleString("en", { maximumSignificantDigits: most });
export const FORMATS = {
  count: (n) => (n >= 1000 ? digits(Math.round(n), 4) : digits(n, 3)),
  share: (n) => `${digits(100 * n, 3)} %`,
  seconds: (n) => (n < 0.001 ? `${digits(1e6 * n, 3)} µs` : n < 1 ? `${digits(1e3 * n, 3)} ms` : `${digits(n, 3)} s`),
  bytes: (n) => {
    const i = n >= 1 ? Math.min(4, Math.floor(Math.log2(n) / 10)) : 0;
    return `${digits(n / 1024 ** i, 4)} ${["B", "KiB", "MiB", "GiB", "TiB"][i]}`;
  },
};
export const written = (n, kind) => (n === null || n === undefined ? "–" : FORMATS[kind](n));

// A panel: its title, and for each line of it the label, the latest value or that under the pointer, and the curve.
export class Chart extends Component {
  state = {};

  componentDidMount() {
    this.dark = matchMedia("(prefers-color-scheme: dark)");
    this.dark.onchange = () => this.build();
    this.size = new ResizeObserver(() => this.plot.setSize({ width: this.place.clientWidth, height: 120 }));
    this.build();
    this.size.observe(this.place);
  }

  componentDidUpdate(before) { if (before.points !== this.props.points) this.plot.setData(this.data(), true); }

  componentWillUnmount() { this.size.disconnect(); this.plot.destroy(); }

  data() { return ["t", ...this.props.lines.map(([key]) => key)].map((key) => this.props.points.map((each) => each[key] ?? null)); }

  build() {
    this.plot?.destroy();
    const colour = (name) => getComputedStyle(this.base.querySelector(`.${name}`)).color, { kind } = this.props;
    const axis = { stroke: colour("axis"), grid: { stroke: colour("grid"), width: 1 }, ticks: { show: false }, font: "11px system-ui" };
    this.plot = new uPlot({
      width: this.place.clientWidth, height: 120, legend: { show: false }, padding: [6, 8, 0, 0],
      cursor: { sync: { key: "dashboard" }, drag: { x: false, y: false }, points: { size: 5 } },
      scales: { x: { range: (_, low, high) => [Math.min(low, high - SHORTEST_S), high] }, y: { range: (_, low, high) => [0, kind === "share" ? 1 : high > 0 ? high * 1.1 : 1] } },
      axes: [{ ...axis, size: 24, space: 80, values: (_, ticks) => ticks.map(time) }, { ...axis, size: 58, space: 28, values: (_, ticks) => ticks.map(FORMATS[kind]) }],
      series: [{}, ...this.props.lines.map((_, i) => ({ stroke: colour(`line${i}`), width: 1.5, points: { show: false } }))],
      hooks: { setCursor: [({ cursor }) => cursor.idx !== this.state.at && this.setState({ at: cursor.idx })] },
    }, this.data(), this.place);
  }

  render({ title, lines, kind, points, note }, { at }) {
    const shown = points[at] ?? points.at(-1) ?? {};
    return html`<figure class="panel">
      <figcaption>${title}${note && html` <small>${note}</small>`}</figcaption>
      <div class="legend">${lines.map(([key, label], i) => html`<span><i class=${`line${i}`}></i>${label} <output data-key=${key}>${written(shown[key], kind)}</output></span>`)}
        <i class="axis"></i><i class="grid"></i></div>
      <div ref=${(place) => { this.place = place; }}></div>
    </figure>`;
  }
}
