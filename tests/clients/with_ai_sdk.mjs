import assert from "node:assert/strict";
import { test } from "node:test";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateObject, generateText, streamText, tool } from "ai";
import { z } from "zod";
import { answer, apiKey, baseURL, chatTokens, completion, messages, model, prompt, upToSaid } from "./served.mjs";

const provider = createOpenAICompatible({ name: "local", baseURL, apiKey, includeUsage: true, supportsStructuredOutputs: true });
const settings = { maxOutputTokens: 12, temperature: 0, maxRetries: 0 };
const chat = { ...settings, model: provider.chatModel(model), messages };
const complete = { ...settings, model: provider.completionModel(model) };

test("chat", async () => {
  const { text, usage, finishReason } = await generateText(chat);
  assert.deepEqual([text, finishReason, usage.inputTokens, usage.outputTokens], [answer, "length", chatTokens, 12]);
});

test("chat streams the same", async () => {
  const result = streamText(chat);
  let text = "";
  for await (const piece of result.textStream) text += piece;
  const usage = await result.usage;
  assert.deepEqual([text, await result.finishReason], [answer, "length"]);
  assert.deepEqual([usage.inputTokens, usage.outputTokens], [chatTokens, 12]);
});

test("chat stops", async () => {
  const { text, finishReason } = await generateText({ ...chat, stopSequences: [" said"] });
  assert.deepEqual([text, finishReason], [upToSaid, "stop"]);
});

test("completions", async () => {
  const { text, usage } = await generateText({ ...complete, prompt });
  let streamed = "";
  for await (const piece of streamText({ ...complete, prompt }).textStream) streamed += piece;
  assert.equal(streamed, text);
  assert.equal(usage.outputTokens, 12);
});

const weather = z.object({ city: z.enum(["Oslo", "Paris"]), day: z.union([z.literal(1), z.literal(2)]) });
const forced = { ...chat, maxOutputTokens: 200, toolChoice: "required" };
const tools = { weather: tool({ inputSchema: weather, strict: true }) };
const oneCall = { providerOptions: { local: { parallel_tool_calls: false } } };

test("an object of a schema", async () => {
  const { object } = await generateObject({ ...chat, maxOutputTokens: 200, schema: weather });
  assert.ok(weather.safeParse(object).success);
});

test("a forced call, whole and in a stream", async () => {
  const { toolCalls, finishReason } = await generateText({ ...forced, ...oneCall, tools });
  assert.deepEqual([toolCalls.map((call) => call.toolName), finishReason], [["weather"], "tool-calls"]);
  assert.ok(weather.safeParse(toolCalls[0].input).success);
  const streamed = await streamText({ ...forced, ...oneCall, tools }).toolCalls;
  assert.deepEqual(streamed.map((call) => call.input), [toolCalls[0].input]);
});

test("errors have their types", async () => {
  const status = (expected, named) => (error) => {
    assert(APICallError.isInstance(error), error);
    assert.equal(error.statusCode, expected);
    return named.test(error.message);
  };
  await assert.rejects(generateText({ ...chat, temperature: -1 }), status(400, /temperature/));
  await assert.rejects(generateText({ ...chat, messages: [{ role: "user", content: "long ".repeat(600) }] }), status(400, /context/));
  await assert.rejects(generateText({ ...chat, model: provider.chatModel("unheard-of") }), status(404, /unheard-of/));
  const locked = createOpenAICompatible({ name: "local", baseURL, apiKey: "wrong" });
  await assert.rejects(generateText({ ...chat, model: locked.chatModel(model) }), status(401, /key/));
});

test("an abort ends the request", async () => {
  const abortSignal = AbortSignal.timeout(1);
  await assert.rejects(generateText({ ...chat, maxOutputTokens: 400, abortSignal }), /abort|timeout/i);
  assert.equal((await generateText(chat)).text, answer);
});
