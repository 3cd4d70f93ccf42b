// The view of one turn: text, thought, calls, figures, and what can be done with it.
import { html, useState, useRef, useLayoutEffect, useMemo } from "./vendor/preact-htm.js";
import { copy, rendered } from "./markdown.js";
import { Tokens } from "./tokens.js";

function Markdown({ text }) {
  const place = useRef();
  useLayoutEffect(() => place.current.replaceChildren(rendered(text)), [text]);
  return html`<div class="markdown" ref=${place}></div>`;
}

// Whether a key sends a text. An input method uses Enter, too.
export const isSend = ({ key, shiftKey, isComposing }) => key === "Enter" && !shiftKey && !isComposing;

function Editor({ turn, onSave, onCancel }) {
  const area = useRef();
  useLayoutEffect(() => { area.current.focus(); area.current.selectionStart = turn.content.length; }, []);
  const keys = (event) => {
    if (event.key === "Escape") onCancel();
    if (!isSend(event)) return;
    event.preventDefault();
    onSave(area.current.value);
  };
  return html`<div class="editor"><textarea ref=${area} aria-label="Edit" rows="4" onKeyDown=${keys}
    defaultValue=${turn.content}></textarea>
    <button onClick=${onCancel}>Cancel</button><button class="primary" onClick=${() => onSave(area.current.value)}>${turn.role === "user" ? "Send" : "Save"}</button></div>`;
}

const pretty = (text) => { try { return JSON.stringify(JSON.parse(text), null, 2); } catch { return text; } };

function Figures({ turn: { stats, finish }, context }) {
  const parts = stats ? [
    `${stats.made} tokens`, `${stats.rate.toFixed(1)} tokens/s`, `first after ${Math.round(stats.ttft)} ms`,
    `prompt ${stats.prompt}, ${stats.cached} cached`, context && `${stats.prompt + stats.made} of ${context} in context`,
  ] : [];
  const text = [...parts, finish].filter(Boolean).join(" · ");
  return text && html`<p class="figures muted small">${text}</p>`;
}

function Copy({ text }) {
  const [said, setSaid] = useState("Copy");
  return html`<button onClick=${async () => setSaid(await copy(text))} onBlur=${() => setSaid("Copy")}>${said}</button>`;
}

function Answer({ turn, app, running }) {
  const scored = app.settings.probabilities && turn.tokens?.length;
  const body = useMemo(() => scored
    ? html`<${Tokens} turn=${turn} special=${app.info.special} plain=${app.plain} onPick=${app.running ? null : (start) => app.branch(turn, start)} />`
    : app.plain ? html`<div class="text">${turn.content}</div>` : html`<${Markdown} text=${turn.content} />`,
  [turn, turn.content, turn.tokens?.length, scored, app.plain, app.running, app.current]);
  return html`
    ${turn.thought && html`<details class="thought"><summary>${running && !turn.content ? "Thinking…" : "Thought"}</summary><div class="text">${turn.thought}</div></details>`}
    ${body}
    ${turn.calls?.map((call) => html`<div class="call"><code>${call.name}</code><pre>${pretty(call.args)}</pre></div>`)}
    ${running && html`<span class="cursor"></span>`}
    ${turn.error && html`<p class="error" role="alert">${turn.error} <button disabled=${app.running} onClick=${() => app.again(turn)}>Try again</button></p>`}
    <${Figures} turn=${turn} context=${app.info.context} />`;
}

export function Turn({ turn, app, all }) {
  const running = app.running?.turn === turn;
  const editing = app.editing === turn;
  const at = all.indexOf(turn);
  const edit = (on) => app.change({ editing: on ? turn : null });
  const actions = html`<div class="actions small muted">
    ${all.length > 1 && html`<span class="branches"><button aria-label="Previous branch" disabled=${at === 0} onClick=${() => app.choose(all[at - 1])}>‹</button>
      ${at + 1}/${all.length}<button aria-label="Next branch" disabled=${at + 1 === all.length} onClick=${() => app.choose(all[at + 1])}>›</button></span>`}
    <${Copy} text=${turn.content} />
    <button disabled=${app.running} onClick=${() => edit(true)}>Edit</button>
    ${turn.role === "assistant" && html`<button disabled=${app.running} onClick=${() => app.again(turn)}>Regenerate</button>
      <button disabled=${running} onClick=${() => app.showPrompt(turn)}>Prompt</button>`}
  </div>`;
  return html`<article class=${turn.role} aria-label=${turn.role}>
    ${editing ? html`<${Editor} turn=${turn} onSave=${(text) => app.edit(turn, text)} onCancel=${() => edit(false)} />`
      : turn.role === "assistant" ? html`<${Answer} turn=${turn} app=${app} running=${running} />`
      : html`<div class="text">${turn.content}</div>`}
    ${!editing && !running && actions}
  </article>`;
}
