/**
 * Answers that a reload cuts off. A page that is left has no time for IndexedDB, so it puts what it was writing
 * into localStorage, and the next page that opens takes it into the store.
 */

import { put, storage } from "./preferences.js";

/** @typedef {import("./conversation.js").Conversation} Conversation */

const PREFIX = "moesaic.rescue.";

/** @param {Conversation} conversation one that is not stored as it is now */
export function rescue(conversation) {
  put(storage("localStorage"), PREFIX + conversation.id, JSON.stringify(conversation));
}

/**
 * Stores what earlier pages left behind.
 * @param {import("./store.js").Store} store
 */
export async function recover(store) {
  const area = storage("localStorage");
  for (const name of Object.keys(area ?? {}).filter((name) => name.startsWith(PREFIX))) {
    /** @type {Conversation} */
    const left = JSON.parse(area?.getItem(name) ?? "null");
    area?.removeItem(name);
    const stored = await store.get(left.id);
    // Removed, or gone on with, in another tab: then that holds.
    if (stored ? stored.revision !== left.revision && !continues(left, stored) : left.revision > 0) continue;
    await store.save({ ...left, revision: stored?.revision ?? 0 });
  }
}

/**
 * @param {Conversation} left
 * @param {Conversation} stored
 * @returns {boolean} whether `left` is `stored` with more of its last answer
 */
function continues(left, stored) {
  const place = left.messages.length - 1;
  const shorter = stored.messages.length < left.messages.length ? "" : stored.messages[place].content;
  return stored.messages.length <= left.messages.length && stored.messages.length >= place && left.messages[place].content.startsWith(shorter);
}
