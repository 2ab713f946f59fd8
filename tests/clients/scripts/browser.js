// OpenAI's and Anthropic's packages in a web page of another origin than the server's. Each function returns what it saw.

import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";

const ASK = [{ role: "user", content: "Tell a story about a king." }];

function failure(error) {
  return [error.constructor.name, error.status, Boolean(error.headers?.get("x-request-id"))];
}

async function refusal(promise) {
  return await promise.then(() => "not refused", failure);
}

export async function openai(url, key, model) {
  const options = { baseURL: `${url}/v1`, dangerouslyAllowBrowser: true, maxRetries: 0 };
  const client = new OpenAI({ ...options, apiKey: key });
  const body = { model, messages: ASK, max_tokens: 24, temperature: 0 };
  const whole = await client.chat.completions.create(body, { idempotencyKey: "one", headers: { "x-own": "1" } });
  const streamed = [];
  for await (const chunk of await client.chat.completions.create({ ...body, stream: true })) {
    streamed.push(chunk.choices[0]?.delta?.content ?? "");
  }
  const response = await client.responses.create({ model, input: ASK[0].content, max_output_tokens: 24, temperature: 0 });
  const long = { model, messages: ASK, max_tokens: 2000, ignore_eos: true, stream: true };
  const aborted = await client.chat.completions.create(long);
  let pieces = 0;
  for await (const _ of aborted) {
    pieces += 1;
    aborted.controller.abort();
  }
  return {
    text: whole.choices[0].message.content,
    id: Boolean(whole._request_id),
    streamed: streamed.join(""),
    response: response.output_text,
    pieces,
    models: (await client.models.list()).data.map(({ id }) => id),
    missing: await refusal(client.chat.completions.create({ ...body, model: "gpt-4" })),
    value: await refusal(client.chat.completions.create({ ...body, temperature: -1 })),
    locked: await refusal(new OpenAI({ ...options, apiKey: "wrong" }).models.list()),
  };
}

export async function anthropic(url, key, model) {
  const options = { baseURL: url, dangerouslyAllowBrowser: true, maxRetries: 0 };
  const client = new Anthropic({ ...options, apiKey: key });
  const body = { model, messages: ASK, max_tokens: 24, temperature: 0 };
  const whole = await client.messages.create(body);
  const stream = client.messages.stream(body);
  const streamed = [];
  stream.on("text", (text) => streamed.push(text));
  const final = await stream.finalMessage();
  const aborted = await client.messages.create({ ...body, max_tokens: 2000, stream: true });
  let events = 0;
  for await (const _ of aborted) {
    events += 1;
    aborted.controller.abort();
  }
  return {
    text: whole.content[0].text,
    id: Boolean(whole._request_id),
    streamed: streamed.join(""),
    final: final.content[0].text,
    events,
    read: whole.usage.input_tokens + whole.usage.cache_read_input_tokens,
    counted: (await client.messages.countTokens({ model, messages: ASK })).input_tokens,
    missing: await refusal(client.messages.create({ ...body, model: "claude" })),
    value: await refusal(client.messages.create({ ...body, temperature: -1 })),
    locked: await refusal(new Anthropic({ ...options, apiKey: "wrong" }).messages.create(body)),
  };
}

export async function busy(url, key, model) {
  const options = { dangerouslyAllowBrowser: true, maxRetries: 1, apiKey: key };
  const body = { model, messages: ASK, max_tokens: 24 };
  const seen = (error) => [error.constructor.name, error.status, error.headers.get("retry-after")];
  const one = new OpenAI({ ...options, baseURL: `${url}/v1` }).chat.completions.create(body);
  const other = new Anthropic({ ...options, baseURL: url }).messages.create(body);
  return [await one.catch(seen), await other.catch(seen)];
}
