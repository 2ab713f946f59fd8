/** Streams that break, at every byte: one answer all the same, or a typed error. BREAKING says where the server is. */

import assert from "node:assert/strict";
import test from "node:test";
import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";
import * as moesaic from "../../../moesaic/serve/web/client/index.js";

const { AnswerChanged, BadReply, Client, ConnectionFailed, MoesaicError, Overloaded, StreamBroken } = moesaic;
const [root, step, size, middle, afterEnds] = JSON.parse(process.env.BREAKING ?? "[]");
const TEXT = "Grüß dich, 🐇!";
const ARGUMENTS = '{"city": "Århus"}';
const retries = { first: 0 };

function client(plan, options) {
  const written = Object.entries(plan).map(([name, value]) => `${name}=${value}`);
  return new Client({ baseUrl: `${root}/${written.join(",")}`, retries, ...options });
}

async function collect(stream, pieces = []) {
  for await (const piece of stream) pieces.push(piece);
  return pieces;
}

function assertOneAnswer(pieces) {
  assert.equal(pieces.filter(({ index }) => index === 0).map(({ text }) => text).join(""), TEXT);
  const calls = pieces.filter(({ index }) => index === 1).flatMap((piece) => piece.calls);
  assert.equal(calls.map((part) => part.arguments).join(""), ARGUMENTS);
  assert.deepEqual(calls.filter(({ id }) => id).map(({ id, name }) => [id, name]), [["c1", "weather"]]);
  const ends = pieces.filter(({ reason }) => reason).map(({ index, reason }) => `${index} ${reason}`);
  assert.deepEqual(ends.sort(), ["0 stop", "1 tool_calls"]);
}

test("a stream that breaks anywhere is one answer", async () => {
  for (let cut = 0; cut <= size; cut += step) {
    const stream = client({ cut, how: cut % 2 ? "eof" : "reset", keyed: 1 }).chat("Hi", { stream: true });
    assertOneAnswer(await collect(stream));
    const answer = await stream.answer();
    assert.deepEqual([answer.text, answer.usage.completion_tokens, answer.id, answer.requestId], [TEXT, 9, "a", "r1"]);
    assert.deepEqual(answer.alternatives[0].calls, [{ id: "c1", name: "weather", arguments: ARGUMENTS }]);
  }
});

test("also if it breaks more often than there are tries, as long as it goes on", async () => {
  const cuts = Array.from({ length: Math.floor(size / 60) }, (_, place) => 1 + 60 * place);
  const stream = client({ cut: cuts.join("+"), how: "end", keyed: 1 }).chat("Hi", { stream: true });
  assertOneAnswer(await collect(stream));
  assert.ok(stream.resumed > 12);
});

test("one that does not go on fails", async () => {
  const stream = client({ cut: Array(20).fill(middle).join("+"), keyed: 1 }).chat("Hi", { stream: true });
  await assert.rejects(collect(stream), { name: "StreamBroken", message: /could not be resumed/ });
  assert.ok(stream.text !== "" && TEXT.startsWith(stream.text));
  await assert.rejects(stream.answer(), StreamBroken);
});

for (const [name, plan, error] of [
  ["without idempotency keys", { cut: middle }, StreamBroken],
  ["without them, and the response looks whole", { cut: middle, how: "end" }, StreamBroken],
  ["with a key that was forgotten", { cut: middle, keyed: 1, forgets: 1 }, StreamBroken],
  ["another text", { cut: middle, keyed: 1, other: "text" }, AnswerChanged],
  ["a shorter text", { cut: middle, keyed: 1, other: "short" }, AnswerChanged],
  ["another call", { cut: afterEnds, keyed: 1, other: "call" }, AnswerChanged],
  ["other arguments", { cut: afterEnds, keyed: 1, other: "arguments" }, AnswerChanged],
  ["another reason", { cut: afterEnds, keyed: 1, other: "reason" }, AnswerChanged],
  ["an error event", { body: "error" }, MoesaicError],
  ["no [DONE]", { body: "undone" }, StreamBroken],
  ["no reason", { body: "unreasoned" }, BadReply],
  ["no JSON", { body: "junk" }, BadReply],
  ["no events", { body: "html" }, BadReply],
]) {
  test(`never a good end: ${name}`, async () => {
    const pieces = [];
    const failed = collect(client(plan).chat("Hi", { stream: true }), pieces);
    await assert.rejects(failed, (found) => found.constructor === error);
    assert.ok(TEXT.startsWith(pieces.filter(({ index }) => index === 0).map(({ text }) => text).join("")));
  });
}

test("silence is a break and comments are none", async () => {
  // Node's fetch forgets what an abort is for when garbage is collected.
  setFlagsFromString("--expose-gc");
  setInterval(runInNewContext("gc"), 20).unref();
  const timeouts = { silence: 0.5 };
  const stream = client({ cut: middle, how: "hang", keyed: 1 }, { timeouts }).chat("Hi", { stream: true });
  assertOneAnswer(await collect(stream));
  assert.equal(stream.resumed, 1);
  assertOneAnswer(await collect(client({ beats: 10 }, { timeouts }).chat("Hi", { stream: true })));
});

test("whole answers are asked for again", async () => {
  for (const plan of [{ status: "429+503+409" }, { drop: 2 }, { cut: 9, how: "reset" }, { cut: 9 }, { status: 500, after: 0 }]) {
    assert.equal((await client(plan).chat("Hi")).text, TEXT);
  }
  await assert.rejects(client({ status: "503+503+503+503" }).chat("Hi"), { name: "Unavailable", status: 503 });
  await assert.rejects(client({ status: "500" }).chat("Hi"), { name: "MoesaicError", message: "not now" });
  const spent = client({ status: 429, after: 3600 }, { retries: {} }).chat("Hi");
  await assert.rejects(spent, (error) => error instanceof Overloaded && error.retryAfter === 3600);
});

test("an abort ends the waiting", async () => {
  const waiting = client({ status: 429, after: 30 }).chat("Hi", { signal: AbortSignal.timeout(100) });
  await assert.rejects(waiting, { name: "TimeoutError" });
  const stream = client({ cut: middle, how: "hang" }).chat("Hi", { stream: true });
  await assert.rejects(
    async () => {
      for await (const _ of stream) setTimeout(() => stream.abort(), 50);
    },
    { name: "AbortError" },
  );
});

test("nobody there", async () => {
  const nobody = new Client({ baseUrl: "http://127.0.0.1:9", retries });
  await assert.rejects(nobody.models(), ConnectionFailed);
});
