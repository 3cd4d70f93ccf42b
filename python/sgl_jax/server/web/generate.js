// One answer: the request made of a conversation, and the stream read into a turn.
import { events } from "./api.js";
import { before } from "./store.js";
import { scoreReader } from "./tokens.js";

const PLAIN_TOKENS = 256; // the API's own default for completions is 16

const message = ({ role, content, thought, calls, call }) => ({
  role,
  content,
  ...(thought && { reasoning_content: thought }),
  ...(calls && { tool_calls: calls.map(({ id, name, args }) => ({ id, type: "function", function: { name, arguments: args } })) }),
  ...(call && { tool_call_id: call }),
});

// The conversation before a turn, and the beginning that the turn may have, as messages or as plain text.
export function prompt(conversation, turn, plain) {
  const turns = before(conversation, turn).filter(({ role, content, calls }) => role !== "assistant" || content || calls);
  if (plain) return { prompt: turns.map(({ content }) => content).join("") + (turn.head ?? "") };
  const messages = turns.map(message);
  if (conversation.system) messages.unshift({ role: "system", content: conversation.system });
  if (!turn.head) return { messages };
  return { messages: [...messages, message({ ...turn, content: turn.head })], continue_final_message: true };
}

// `alternatives`: how many to ask for with each token; 0 for no probabilities.
export function request(conversation, turn, { model, plain, alternatives, params }) {
  const scores = plain ? { logprobs: alternatives } : { logprobs: true, top_logprobs: alternatives };
  return {
    ...(plain && { max_tokens: PLAIN_TOKENS }),
    ...params,
    ...prompt(conversation, turn, plain),
    ...(alternatives && scores),
    model,
    stream: true,
    stream_options: { include_usage: true },
  };
}

// Streams into the turn, and calls `changed` after each event. Throws where the stream breaks off.
export async function generate(turn, body, { signal, on, special, changed }) {
  const begun = performance.now();
  const scored = scoreReader(special);
  let first, last;
  for await (const event of events(body.messages ? "v1/chat/completions" : "v1/completions", { body, signal, on })) {
    const [choice] = event.choices;
    if (choice) {
      const { content = choice.text, reasoning_content, tool_calls } = choice.delta ?? {};
      if (content || reasoning_content || tool_calls) first ??= performance.now();
      last = performance.now();
      turn.content += content ?? "";
      if (reasoning_content) turn.thought = (turn.thought ?? "") + reasoning_content;
      for (const { index, id, function: { name, arguments: args = "" } } of tool_calls ?? []) {
        ((turn.calls ??= [])[index] ??= { id, name, args: "" }).args += args;
      }
      if (choice.logprobs) (turn.tokens ??= []).push(...scored(choice.logprobs));
      if (choice.finish_reason) turn.finish = choice.finish_reason;
    }
    if (event.usage) turn.stats = figures(event.usage, first - begun || 0, last - first, last - begun);
    changed();
  }
}

// Tokens and times: `ttft` ms to the first token, then `between` ms to the last, `whole` in all.
function figures({ prompt_tokens, completion_tokens, prompt_tokens_details }, ttft, between, whole) {
  const rate = between > 1 && completion_tokens > 1 ? (completion_tokens - 1) / between : completion_tokens / whole;
  return { prompt: prompt_tokens, cached: prompt_tokens_details?.cached_tokens ?? 0, made: completion_tokens, ttft, rate: Number.isFinite(rate) ? rate * 1000 : 0 };
}
