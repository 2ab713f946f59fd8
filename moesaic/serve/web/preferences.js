/** What this browser remembers beside conversations: the API key, the theme, the model used last and its settings. */

import { known } from "./sampling.js";

const KEY = "moesaic.key";
const LAST = "moesaic.last";
const THEME = "moesaic.theme"; // theme.js reads it before the first paint

/**
 * Returns a storage of the browser, or null where the reader has forbidden it: then merely naming it throws.
 * @param {"localStorage" | "sessionStorage"} name
 * @returns {Storage | null}
 */
export function storage(name) {
  try {
    return window[name];
  } catch {
    return null;
  }
}

/**
 * @param {Storage | null} area
 * @param {string} name
 * @param {string} value
 */
export function put(area, name, value) {
  try {
    area?.setItem(name, value);
  } catch {
    // It is full: what is kept here can be done without.
  }
}

/** @type {string | null} the key of this page, for where nothing can be stored */
let current = null;

/** @returns {string} empty: there is none */
export function readKey() {
  return current ?? storage("sessionStorage")?.getItem(KEY) ?? storage("localStorage")?.getItem(KEY) ?? "";
}

/**
 * Keeps the key until the tab is closed, or until it is replaced.
 * @param {string} key
 * @param {boolean} remember
 */
export function writeKey(key, remember) {
  current = key;
  for (const area of [storage("sessionStorage"), storage("localStorage")]) area?.removeItem(KEY);
  if (key) put(storage(remember ? "localStorage" : "sessionStorage"), KEY, key);
}

/** @returns {{model: string, settings: import("./sampling.js").Settings}} what the next conversation begins with */
export function readLast() {
  try {
    const last = JSON.parse(storage("localStorage")?.getItem(LAST) ?? "{}");
    return { model: typeof last.model === "string" ? last.model : "", settings: known(last.settings ?? {}) };
  } catch {
    return { model: "", settings: {} };
  }
}

/** @param {import("./conversation.js").Conversation} conversation */
export function writeLast({ model, settings }) {
  put(storage("localStorage"), LAST, JSON.stringify({ model, settings }));
}

/** @returns {string} light, dark, or system */
export function readTheme() {
  return document.documentElement.dataset.theme ?? "system";
}

/** @param {string} theme */
export function writeTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  put(storage("localStorage"), THEME, theme);
}
