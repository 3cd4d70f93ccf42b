// What the launch decided at its start: the model, the memory of each device, the programs.
import { html } from "./vendor/preact-htm.js";
import { written } from "./dashboard_charts.js";

const whole = (n) => n.toLocaleString("en");

export function Launch({ info, last, limits, refused, fits, onLimits }) {
  const engine = info?.engine;
  if (!engine) return null;
  const { device_bytes: total, device_weight_bytes: weights, device_adapter_bytes: adapters, device_kv_bytes: kv } = engine;
  const memory = [["weights", weights], ["adapters", adapters], ["KV cache", kv], ["free", total - weights - adapters - kv]];
  const rows = [
    ["Model", `${engine.model_path}, ${engine.architecture}`],
    ["Computes in", engine.quantization ? `${engine.dtype}, weights ${engine.quantization}` : engine.dtype],
    ["Devices", `${engine.num_devices} × ${engine.device_kind}`],
    ["Context", `${whole(engine.context_length)} tokens`],
    ["KV pool", `${whole(engine.max_total_tokens)} tokens in pages of ${engine.page_size}: ${written(engine.max_total_tokens / engine.context_length, "count")} full contexts`],
    ["At once", `${engine.max_running_requests} requests, ${whole(engine.chunked_prefill_size)} prompt tokens a step`],
    ["Started in", written(engine.start_seconds, "seconds")],
    ["Should stay 0", `${written(last.preemptions, "count")} preemptions, ${written(last.compiles, "count")} programs compiled after ready`],
  ];
  if (last.compiling) rows.push(["Compiling", `${last.compiling} of ${engine.num_programs} programs`]);
  if (engine.adapters?.length) rows.push(["Adapters at start", engine.adapters.map((each) => each.name).join(", ")]);
  return html`<section class="launch"><h2>This launch</h2>
    <dl>${rows.map(([name, text]) => html`<dt>${name}</dt><dd>${text}</dd>`)}</dl>
    <div>${total > 0 && html`<h3>Memory per device, as planned</h3>
      <table>${memory.filter(([, n]) => n > 0).map(([name, n]) => html`<tr><th>${name}</th><td><meter max=${total} value=${n} /></td><td>${written(n, "bytes")}</td></tr>`)}</table>`}
    ${engine.programs?.length > 0 && html`<details><summary>${engine.programs.length} programs</summary><ul>${engine.programs.map((name) => html`<li>${name}</li>`)}</ul></details>`}
    <h3>Limits of the machine</h3>
    <p>${fits ? `${whole(Math.round(limits.memory_gb_per_s))} GB/s, ${written(limits.matmul_tflop_per_s, "count")} TFLOP/s` : limits ? `The file is of ${limits.num_devices} × ${limits.device_kind}.` : "Not known; measure_limits --output writes them."}
      <label> File <input type="file" accept=".json" onChange=${onLimits} /></label></p>
    ${refused && html`<p role="alert">${refused}</p>`}</div>
  </section>`;
}
