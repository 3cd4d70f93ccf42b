// The panel of settings. Parameters are made from the API's own description, so that none is missing or out of date.
import { html, useLayoutEffect } from "./vendor/preact-htm.js";

const FIRST = "temperature top_p top_k min_p max_tokens repetition_penalty seed stop reasoning_effort".split(" ");
// Fields that the page itself fills in, and those that change nothing in an answer.
const OWN = `messages prompt model stream stream_options n best_of rid logprobs top_logprobs echo response_format json_schema
  continue_final_message add_generation_prompt max_completion_tokens user metadata store service_tier safety_identifier
  prompt_cache_key prompt_cache_retention`.split(/\s+/);

const isSet = (kind) => kind.type !== "null" && kind.const === undefined && kind.maxItems !== 0 && kind.items?.const === undefined;

// Returns the parameters of a request: name, description, kind of input, limits; the most used first.
export function fieldsOf(openapi, plain) {
  const { properties } = openapi.components.schemas[plain ? "CompletionRequest" : "ChatCompletionRequest"];
  const found = Object.entries(properties).flatMap(([name, { anyOf, description = "", ...own }]) => {
    const kinds = (anyOf ?? [own]).filter(isSet);
    if (OWN.includes(name) || !kinds.length || description.startsWith("another name")) return [];
    const { type, enum: choices = type === "boolean" && [false, true] } = kinds[0];
    const kind = choices ? "choice" : { number: "number", integer: "number", string: "text" }[type] ?? "json";
    return [{ name, description, choices, kind, list: kinds.some((each) => each.type === "array") }];
  });
  const rank = ({ name }) => (FIRST.includes(name) ? FIRST.indexOf(name) : FIRST.length);
  return found.sort((a, b) => rank(a) - rank(b)).map((field) => ({ ...field, first: FIRST.includes(field.name) }));
}

function json(text, name) {
  try { return JSON.parse(text); } catch (error) { throw new Error(`${name} is not valid JSON: ${error.message}`); }
}

function valueOf({ name, kind, choices, list }, text) {
  if (kind === "choice") return choices.find((each) => String(each) === text);
  if (kind === "text") return list && text.startsWith("[") ? json(text, name) : text; // as for several stop strings
  return kind === "json" ? json(text, name) : Number(text);
}

// Returns the parameters that are set, as the request has them. Throws what cannot be read.
export function paramsOf(fields, { params, schema }) {
  const found = Object.fromEntries(fields.filter(({ name }) => params[name]).map((field) => [field.name, valueOf(field, params[field.name])]));
  if (!schema.trim()) return found;
  return { ...found, response_format: { type: "json_schema", json_schema: { name: "answer", schema: json(schema, "The JSON schema") } } };
}

function Field({ field: { name, description, kind, choices }, value = "", onValue }) {
  const about = { value, onInput: (event) => onValue(event.target.value) };
  const input = kind === "choice"
    ? html`<select ...${about}><option value="">default</option>${choices.map((each) => html`<option value=${String(each)}>${String(each)}</option>`)}</select>`
    : kind === "json" ? html`<textarea rows="2" placeholder="JSON" ...${about}></textarea>`
    : html`<input type=${kind} step="any" placeholder="default" ...${about} />`;
  return html`<label class="field" title=${description}><code>${name}</code>${input}</label>`;
}

export function Settings({ app }) {
  const { settings, current, fields, info } = app;
  useLayoutEffect(() => { app.describe().catch((error) => app.say(error.message)); }, []);
  const field = (each) => html`<${Field} key=${each.name} field=${each} value=${settings.params[each.name]}
    onValue=${(value) => app.set({ params: { ...settings.params, [each.name]: value } })} />`;
  let wrong = "";
  try { paramsOf(fields, settings); } catch (error) { wrong = error.message; }
  return html`<aside class="settings" aria-label="Settings">
    ${!app.plain && html`<label>System prompt<textarea rows="4" value=${current.system} onInput=${(event) => app.setSystem(event.target.value)}></textarea></label>`}
    <label>JSON schema of the answer<textarea rows="3" placeholder='{"type": "object", …}' value=${settings.schema}
      onInput=${(event) => app.set({ schema: event.target.value })}></textarea></label>
    ${wrong && html`<p class="error small" role="alert">${wrong}</p>`}
    <h2>Sampling</h2>
    ${fields.filter((each) => each.first).map(field)}
    <details><summary>All parameters</summary>${fields.filter((each) => !each.first).map(field)}</details>
    <button onClick=${() => app.set({ params: {} })}>Back to defaults</button>
    <h2>Page</h2>
    ${info.template
      ? html`<label class="check"><input type="checkbox" checked=${settings.plain} onChange=${(event) => app.set({ plain: event.target.checked })} /> Plain completion, without the chat template</label>`
      : html`<p class="muted small">This model has no chat template. The page completes text.</p>`}
    <button onClick=${() => app.askKey()}>API key…</button>
  </aside>`;
}
