// The server's API: JSON in answer to a question, or one line that says why there is none.

import { at } from "./dom.js";

const PATIENCE = 20; // times that a request is sent again because the server is busy
const KEY = "chiasm-key"; // where the session keeps the server's key

/** What the server said of itself: `models`, the `model` in use, and `limits` of what it takes. */
export const server = { models: [], model: null, limits: {} };

/** What the server, or the way to it, refused, in one line for people. */
export class Refusal extends Error {
  constructor(message, status = 0, after = 1) {
    super(message);
    this.status = status; // of HTTP; 0 where there was no answer
    this.after = after; // seconds until trying again makes sense
  }
}

/**
 * JSON of one route. Nulls of `query` are left out; `picture` ({file, name}) is sent as the form field `images`. While
 * the server is busy (429) it is asked again when it says, and `wait` is told the seconds. Throws Refusal, AbortError.
 */
export async function ask(path, query = {}, picture = null, signal = undefined, wait = () => {}) {
  for (let times = 0; ; times++) {
    try {
      return await once(path, query, picture, signal);
    } catch (error) {
      if (error.status !== 429 || times === PATIENCE) throw error;
      wait(error.after);
      await pause(error.after, signal);
    }
  }
}

/** So many seconds, or until the signal says that nobody waits any more: then throws AbortError. */
function pause(seconds, signal) {
  signal?.throwIfAborted();
  return new Promise((done, fail) => {
    const timer = setTimeout(done, 1000 * seconds);
    const stop = () => {
      clearTimeout(timer);
      fail(signal.reason);
    };
    signal?.addEventListener("abort", stop, { once: true });
  });
}

async function once(path, query, picture, signal) {
  const words = new URLSearchParams(Object.entries(query).filter(([, value]) => value !== null));
  const request = { signal, cache: "no-store", headers: key() ? { Authorization: `Bearer ${key()}` } : {} };
  if (picture) {
    request.method = "POST";
    request.body = new FormData();
    request.body.append("images", picture.file, picture.name);
  }
  let answer;
  try {
    answer = await fetch(`${path}?${words}`, request);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server does not answer. Is it still running?");
  }
  const body = await answer.json().catch(() => null);
  if (answer.ok && body) return body;
  if (answer.status === 401) at("key").hidden = false;
  const why = body?.error?.message ?? `The server answered with ${answer.status} ${answer.statusText}`.trim();
  throw new Refusal(why, answer.status, Number(answer.headers.get("Retry-After")) || 1);
}

function key() {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return null; // browsers can be told to keep nothing
  }
}

/** Keep the key for this session. Throws where the browser forbids it. */
export const keepKey = (value) => sessionStorage.setItem(KEY, value);
