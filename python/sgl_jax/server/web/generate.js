// One answer: the request made of a conversation, and the stream read into a turn.
import { events } from "./api.js";
import { before } from "./store.js";
import { scoreReader } from "./tokens.js";

const PLAIN_TOKENS = 256; // the API's own default for completions is 16

const message = ({ role, content, thought, calls, call }) => ({
  role,
  content: content || (calls ? null : ""),
  ...(thought && { reasoning_content: thought }),
  ...(calls && { tool_calls: calls.map(({ id, name, args }) => ({ id, type: "function", function: { name, arguments: args } })) }),
  ...(call && { tool_call_id: call }),
});

// The conversation up to a turn as the server takes it: messages, or plain text.
export function prompt(conversation, turn, plain) {
  const turns = before(conversation, turn).filter((each) => each.role !== "assistant" || each.content || each.calls);
  if (plain) return { prompt: turns.map((each) => each.content).join("") + (turn.head ?? "") };
  const messages = turns.map(message);
  if (conversation.system) messages.unshift({ role: "system", content: conversation.system });
  if (!turn.head) return { messages };
  return { messages: [...messages, message({ ...turn, content: turn.head })], continue_final_message: true };
}

export function request(conversation, turn, { model, plain, probabilities, params }) {
  const scores = plain ? { logprobs: probabilities } : { logprobs: true, top_logprobs: probabilities };
  return {
    ...(plain && { max_tokens: PLAIN_TOKENS }),
    ...params,
    ...prompt(conversation, turn, plain),
    ...(model && { model }),
    ...(probabilities && scores),
    stream: true,
    stream_options: { include_usage: true },
  };
}

// Streams into the turn; `changed` is called after each event. Throws where it breaks off.
export async function generate(turn, body, { signal, on, special, changed }) {
  const begun = performance.now();
  const reader = scoreReader(special);
  let first, last;
  for await (const event of events(body.messages ? "v1/chat/completions" : "v1/completions", { body, signal, on })) {
    const choice = event.choices[0];
    if (choice) {
      const delta = choice.delta ?? { content: choice.text };
      if (delta.content || delta.reasoning_content || delta.tool_calls || choice.logprobs) first ??= last = performance.now();
      if (first) last = performance.now();
      read(turn, delta);
      if (choice.logprobs) (turn.tokens ??= []).push(...reader(choice.logprobs));
      if (choice.finish_reason) turn.finish = choice.finish_reason;
    }
    if (event.usage) turn.stats = stats(event.usage, first - begun, last - first, last - begun);
    changed();
  }
}

function read(turn, delta) {
  turn.content += delta.content ?? "";
  if (delta.reasoning_content) turn.thought = (turn.thought ?? "") + delta.reasoning_content;
  for (const { index, id, function: called } of delta.tool_calls ?? []) {
    const call = ((turn.calls ??= [])[index] ??= { id, name: called.name, args: "" });
    call.args += called.arguments ?? "";
  }
}

function stats(usage, ttft, between, whole) {
  const made = usage.completion_tokens;
  return {
    prompt: usage.prompt_tokens,
    cached: usage.prompt_tokens_details?.cached_tokens ?? 0,
    made,
    ttft: ttft || 0,
    rate: (between > 1 && made > 1 ? (made - 1) / between : made / whole) * 1000 || 0,
  };
}
