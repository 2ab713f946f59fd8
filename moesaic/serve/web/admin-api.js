/** A gateway's routes for administrators. Knows HTTP; knows no page. */

import { ApiError, ask } from "./api.js";

/**
 * @typedef {{name: string, models: string[], slots: number, jobs: string[], about: Record<string, unknown>,
 *   since: number, heard: number, drained: boolean, apart: boolean}} Worker
 * @typedef {{model: string, workers: number, slots: number, queued: number, leased: number, suspects: number,
 *   cost: number}} Queue
 * @typedef {{id: string, model: string, kind: string, key: string, cost: number, worker: string, attempts: number,
 *   crashes: number, events: number}} Job
 * @typedef {{state: string, running: number, workers: number, slots: number, queued: number, leased: number,
 *   suspects: number, seconds: number, lost: number, fenced: number, dead: number}} Status
 * @typedef {{status: Status, workers: Worker[], drained: string[], dismissed: string[], queues: Queue[],
 *   dead: Job[]}} Gateway
 */

const BASE = new URL("../admin/", import.meta.url);

/**
 * @param {string} method
 * @param {string} path
 * @param {string} key
 * @param {unknown} [body]
 * @returns {Promise<any>}
 */
async function send(method, path, key, body) {
  const headers = { Authorization: `Bearer ${key}`, "Content-Type": "application/json" };
  const options = { method, headers, body: body === undefined ? null : JSON.stringify(body) };
  const response = await ask(new URL(path, BASE), options);
  try {
    return await response.json();
  } catch {
    throw new ApiError("What answers here is no gateway.", response.status);
  }
}

/**
 * Returns all that the page shows.
 * @param {string} key
 * @returns {Promise<Gateway>}
 */
export async function look(key) {
  const status = await send("GET", "status", key); // alone and first: a wrong key is to count once
  const [crew, queues, dead] = await Promise.all(["workers", "queues", "jobs?state=dead"].map((path) => send("GET", path, key)));
  return { status, workers: crew.workers, drained: crew.drained, dismissed: crew.dismissed, queues: queues.queues, dead: dead.jobs };
}

/**
 * @param {"drain" | "resume"} what
 * @param {string} key
 */
export const tellGateway = (what, key) => send("POST", what, key);

/**
 * @param {"drain" | "resume" | "dismiss"} what
 * @param {string} name a worker's
 * @param {string} key
 */
export const tellWorker = (what, name, key) => send("POST", `workers/${what}`, key, { name });

/** @param {string} id a dead job's @param {string} key */
export const revive = (id, key) => send("POST", `jobs/${encodeURIComponent(id)}/revive`, key);
