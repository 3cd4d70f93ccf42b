// Numbers of the dashboard: Prometheus' text format, rates and percentiles between two scrapes, and the last hour of them.
const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;
const WINDOW = 6, OLDEST_S = 10; // rates and percentiles are those of five seconds
const RECENT = 600, OLD_EVERY_S = 6, HOUR_S = 3600;

const number = (text) => Number(text.replace("Inf", "Infinity"));
const unescaped = (text) => text.replace(/\\(.)/g, (_, c) => (c === "n" ? "\n" : c));

// Returns { name: [{ labels, value }] }; our own names come without their prefix.
export function parse(text) {
  const found = {};
  for (const line of text.split("\n")) {
    const match = line.startsWith("#") ? null : LINE.exec(line);
    if (!match) continue;
    const labels = {};
    for (const [, name, value] of (match[2] ?? "").matchAll(LABEL)) labels[name] = unescaped(value);
    (found[match[1].replace(/^sgl_jax_/, "")] ??= []).push({ labels, value: number(match[3]) });
  }
  return found;
}

// The sum of a metric's values whose labels are accepted; null without any.
export function value(metrics, name, accepts = () => true) {
  const rows = (metrics[name] ?? []).filter((row) => accepts(row.labels));
  return rows.length ? rows.reduce((sum, row) => sum + row.value, 0) : null;
}

// How much a counter grew; one that is smaller than before began anew.
export function grown(before, now, name, accepts) {
  const [a, b] = [value(before, name, accepts) ?? 0, value(now, name, accepts)];
  return b === null ? null : b < a ? b : b - a;
}

// Whether a counter fell, as it does when the server is started again.
export const beganAnew = (before, now) => Object.keys(before)
  .some((name) => name.endsWith("_total") && (value(now, name) ?? 0) < value(before, name));

// The scrapes that the last one is held against. None is older than a hidden tab or a sleep: `at` is in seconds of the page,
// which a change of the clock leaves alone, and `t` in those of the clock, which go on while the machine sleeps.
export function recent(scrapes) {
  const last = scrapes.at(-1);
  return scrapes.slice(-WINDOW).filter(({ t, at }) => last.at - at < OLDEST_S && Math.abs(last.t - t) < OLDEST_S);
}

// The quantile of what a histogram took in between, as Prometheus' histogram_quantile has it; null if that is nothing.
export function quantile(before, now, name, q) {
  const bounds = (now[`${name}_bucket`] ?? []).map((row) => row.labels.le);
  const counts = bounds.map((le) => grown(before, now, `${name}_bucket`, (labels) => labels.le === le));
  const rank = q * (counts.at(-1) ?? 0);
  if (!rank) return null;
  const i = counts.findIndex((count) => count >= rank);
  const low = i ? number(bounds[i - 1]) : 0, below = i ? counts[i - 1] : 0;
  return i === bounds.length - 1 ? low : low + ((number(bounds[i]) - low) * (rank - below)) / (counts[i] - below);
}

const share = (part, whole) => (whole ? part / whole : null);

// All that is drawn at a time, from the oldest and the last of the recent scrapes. `engine` is that of /get_server_info, `limits` the file of measure_limits, or null.
export function point(first, last, engine, limits) {
  const [a, b] = [first.metrics, last.metrics], seconds = last.at - first.at;
  const rate = (name, accepts) => (seconds ? (grown(a, b, name, accepts) ?? 0) / seconds : null);
  const ratio = (part, whole) => share(grown(a, b, part), grown(a, b, whole));
  const status = (digit) => rate("http_responses_total", (labels) => labels.status[0] === digit);
  const at = (name) => value(b, name), times = {};
  for (const [key, name] of [["ttft", "time_to_first_token_seconds"], ["itl", "inter_token_latency_seconds"]])
    for (const q of [50, 95]) times[`${key}${q}`] = quantile(a, b, name, q / 100);
  const accepted = ratio("spec_decode_num_accepted_tokens_total", "spec_decode_num_drafts_total");
  const read = engine && engine.weight_bytes + at("kv_usage_ratio") * engine.max_total_tokens * engine.kv_bytes_per_token;
  const decode = ratio("decode_step_seconds_total", "decode_steps_total");
  return {
    ...times, t: last.t, decode,
    generated: rate("generation_tokens_total"), prompts: rate("prompt_tokens_total"),
    running: at("num_requests_running"), waiting: at("num_requests_waiting"),
    kv: at("kv_usage_ratio"), cached: at("kv_cached_ratio"),
    hits: ratio("prefix_cache_hit_tokens_total", "prompt_tokens_total"),
    step: ratio("engine_step_seconds_total", "engine_steps_total"),
    least: decode && limits && read ? read / (limits.memory_gb_per_s * 1e9) : null,
    bandwidth: decode && read ? read / decode : null,
    ok: status("2"), refused: status("4"), failed: status("5"),
    accept: accepted === null ? null : 1 + accepted,
    adapters: at("lora_adapters"), slots: at("lora_adapters_on_device"), memory: at("engine_resident_bytes"),
    preemptions: at("preemptions_total"), compiles: at("compiles_after_ready_total"), compiling: at("programs_compiling"),
  };
}

// Points of the last hour: each of the last ten minutes, before them one in six seconds.
export class History {
  old = []; recent = [];

  add(found) {
    this.recent.push(found);
    if (this.recent.length > RECENT) {
      const left = this.recent.shift(), slot = (each) => Math.floor(each.t / OLD_EVERY_S);
      if (!this.old.length || slot(left) !== slot(this.old.at(-1))) this.old.push(left);
    }
    while (this.old.length && this.old[0].t < found.t - HOUR_S) this.old.shift();
  }

  get points() { return [...this.old, ...this.recent]; }
}
