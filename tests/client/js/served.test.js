/** The client and `moesaic serve` with the model tales, at SERVED. */

import assert from "node:assert/strict";
import test from "node:test";
import { Client, InvalidParameter, NotFound, StreamBroken } from "../../../moesaic/serve/web/client/index.js";

const baseUrl = process.env.SERVED;
const client = new Client({ baseUrl: `${baseUrl}/v1/`, model: "tales" });
const ASK = [{ role: "user", content: "Tell a story about a king." }];
const GREEDY = { temperature: 0, max_tokens: 12 };

test("whole and streamed answers are alike", async () => {
  const whole = await client.chat(ASK, { ...GREEDY, logprobs: 2 });
  assert.ok(whole.text && whole.requestId && whole.id);
  assert.deepEqual([whole.reason, whole.model, whole.usage.completion_tokens], ["length", "tales", 12]);
  assert.ok(whole.logprobs.length === 12 && whole.logprobs.every(({ top }) => top.length === 2));
  const stream = client.chat(ASK, { ...GREEDY, logprobs: 2, stream: true });
  let text = "";
  for await (const piece of stream) text += piece.text;
  const told = await stream.answer();
  assert.deepEqual([text, told.text, stream.text], Array(3).fill(whole.text));
  assert.deepEqual([told.logprobs, told.reason, told.message], [whole.logprobs, whole.reason, whole.message]);
  const several = await client.chat(ASK, { max_tokens: 8, n: 3, seed: 1 });
  assert.equal(several.alternatives.length, 2);
});

test("completions, models, embeddings, tokens", async () => {
  const whole = await client.complete("Once upon a", { echo: true, logprobs: 1, ...GREEDY });
  assert.ok(whole.text.startsWith("Once upon a") && whole.logprobs[0].logprob === null);
  const streamed = await client.complete("Once upon a", { stream: true, ...GREEDY }).answer();
  assert.equal("Once upon a" + streamed.text, whole.text);
  const [model] = await client.models();
  assert.deepEqual([model.id, model.task], ["tales", "chat"]);
  const { vectors, usage } = await client.embed(["a king", "a queen"], { dimensions: 7 });
  assert.ok(vectors.length === 2 && vectors[0].length === 7 && usage.prompt_tokens > 0);
  const tokens = await client.tokenize("a king");
  assert.ok(tokens.ids.length > 1 && tokens.ids.length === tokens.texts.length && tokens.context === model.context);
  assert.ok((await client.tokenize(ASK)).ids.length > tokens.ids.length);
});

test("refusals", async () => {
  const missing = await client.chat(ASK, { model: "gpt-4" }).catch((error) => error);
  assert.ok(missing instanceof NotFound && missing.status === 404 && missing.requestId);
  const wrong = await client.chat(ASK, { temperature: -1 }).catch((error) => error);
  assert.ok(wrong instanceof InvalidParameter && wrong.param === "temperature");
  assert.throws(() => client.chat(ASK, { temprature: 0 }), { param: "temprature" });
  assert.throws(() => client.chat(ASK, { temperature: NaN }), { param: "temperature" });
  assert.throws(() => new Client({ baseUrl: "localhost:8000" }), { param: "baseUrl" });
  assert.throws(() => new Client({ key: "a b" }), { param: "key" });
});

test("leaving a stream, and aborts", async () => {
  const long = { max_tokens: 2000, ignore_eos: true, stream: true };
  const left = client.chat(ASK, long);
  for await (const piece of left) if (piece.text) break;
  await assert.rejects(left.answer(), StreamBroken);
  const controller = new AbortController();
  const reading = async () => {
    for await (const piece of client.chat(ASK, { ...long, signal: controller.signal })) {
      if (piece.text) controller.abort(new Error("enough"));
    }
  };
  await assert.rejects(reading(), { message: "enough" });
  await assert.rejects(client.chat(ASK, { signal: AbortSignal.abort() }), { name: "AbortError" });
  for (let running = 1; running > 0; ) {
    const figures = await (await fetch(`${baseUrl}/metrics`)).text();
    running = Number(/^moesaic_num_requests_running\S* (\S+)$/m.exec(figures)[1]);
  }
});
