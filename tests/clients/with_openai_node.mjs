import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";
import { answer, apiKey, baseURL, chatTokens, completion, messages, model, prompt, promptIds, upToSaid } from "./served.mjs";

const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const settings = { model, max_tokens: 12, temperature: 0 };

test("chat", async () => {
  const { choices, usage } = await client.chat.completions.create({ ...settings, messages });
  assert.equal(choices[0].message.content, answer);
  assert.equal(choices[0].finish_reason, "length");
  assert.deepEqual([usage.prompt_tokens, usage.completion_tokens], [chatTokens, 12]);
});

test("chat streams the same", async () => {
  const options = { stream: true, stream_options: { include_usage: true } };
  let text = "";
  let usage;
  for await (const chunk of await client.chat.completions.create({ ...settings, messages, ...options })) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage;
  }
  assert.equal(text, answer);
  assert.deepEqual([usage.prompt_tokens, usage.completion_tokens], [chatTokens, 12]);
});

test("the stream helper joins the chunks", async () => {
  const stream = client.chat.completions.stream({ ...settings, messages, stop: [" said"] });
  const { message, finish_reason } = (await stream.finalChatCompletion()).choices[0];
  assert.deepEqual([message.content, finish_reason], [upToSaid, "stop"]);
});

test("chat gives log-probabilities", async () => {
  const { choices } = await client.chat.completions.create({ ...settings, messages, logprobs: true, top_logprobs: 2 });
  assert.equal(choices[0].logprobs.content.map((one) => one.token).join(""), answer);
  assert.equal(choices[0].logprobs.content[0].top_logprobs.length, 2);
});

for (const [name, given] of Object.entries({ text: prompt, ids: promptIds })) {
  test(`completions of ${name}`, async () => {
    const { choices, usage } = await client.completions.create({ ...settings, prompt: given, logprobs: 2 });
    assert.equal(choices[0].text, completion);
    assert.equal(choices[0].logprobs.token_logprobs.length, 12);
    assert.deepEqual([usage.prompt_tokens, usage.completion_tokens], [promptIds.length, 12]);
  });
}

test("completions stream the same", async () => {
  let text = "";
  for await (const chunk of await client.completions.create({ ...settings, prompt, stream: true })) {
    text += chunk.choices[0].text;
  }
  assert.equal(text, completion);
});

test("the model is listed and can be looked up", async () => {
  assert.deepEqual((await client.models.list()).data.map((one) => one.id), [model]);
  assert.equal((await client.models.retrieve(model)).id, model);
});

test("errors have their types", async () => {
  const create = (changes, options) => client.chat.completions.create({ ...settings, messages, ...changes }, options);
  await assert.rejects(create({ temperature: -1 }), (error) => {
    assert(error instanceof OpenAI.BadRequestError);
    return error.param === "temperature";
  });
  await assert.rejects(create({ messages: [{ role: "user", content: "long ".repeat(600) }] }), {
    code: "context_length_exceeded",
  });
  await assert.rejects(create({ model: "unheard-of" }), OpenAI.NotFoundError);
  await assert.rejects(new OpenAI({ baseURL, apiKey: "wrong" }).models.list(), OpenAI.AuthenticationError);
});

test("a time limit and an abort end the request", async () => {
  const request = { ...settings, messages, max_tokens: 400 };
  await assert.rejects(client.chat.completions.create(request, { timeout: 1 }), OpenAI.APIConnectionTimeoutError);
  const stream = await client.chat.completions.create({ ...request, stream: true });
  for await (const chunk of stream) {
    assert(chunk.choices);
    break; // the client closes the connection
  }
  assert.equal((await client.chat.completions.create({ ...settings, messages })).choices[0].message.content, answer);
});
